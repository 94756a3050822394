"""The exported model as a folder of data that is safe to load from a stranger.

manifest.json        what it is, digests of every other file, the self-test
weights.safetensors  each tensor once; graphs of every precision take their weights from here
graphs/<engine>-<precision>/body.pt2   the model up to its output layer: ids in, hidden states out
tokenizer/           where the checkpoint has one
"""
