"""The health check of a container: status 0 where the service inside is ready.

It asks the second port where there is one, since that never speaks TLS. Addresses are those of the
variables that `seqloss serve` reads; what its flags say instead cannot be known here.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys

# Where to reach what listens everywhere.
_HERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound
_SECONDS = 3


def main() -> int:
    """Asks once, and prints the answer for `docker inspect`."""
    connection = _connection()
    try:
        connection.request("GET", "/health/ready")
        reply = connection.getresponse()
        print(reply.status, reply.read().decode())
    except (OSError, http.client.HTTPException) as error:
        print(f"{connection.host} port {connection.port}: {error}")
        return 1
    finally:
        connection.close()
    return 0 if reply.status == 200 else 1


def _connection() -> http.client.HTTPConnection:
    if port := os.environ.get("SEQLOSS_ADMIN_PORT"):
        return http.client.HTTPConnection(_host("SEQLOSS_ADMIN_HOST"), int(port), timeout=_SECONDS)
    host, port = _host("SEQLOSS_HOST"), os.environ.get("SEQLOSS_PORT") or "8000"
    if not os.environ.get("SEQLOSS_TLS_CERTIFICATE_FILE"):
        return http.client.HTTPConnection(host, int(port), timeout=_SECONDS)
    # The certificate is for the name that clients use, and the way there is within the container.
    context = ssl._create_unverified_context()  # noqa: S323
    return http.client.HTTPSConnection(host, int(port), timeout=_SECONDS, context=context)


def _host(variable: str) -> str:
    host = os.environ.get(variable) or "127.0.0.1"
    return _HERE.get(host, host)


if __name__ == "__main__":
    sys.exit(main())
