"""More than one device, on Ray: Serve for requests, Data for whole datasets."""
