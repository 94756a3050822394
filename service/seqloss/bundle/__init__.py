"""The exported model as a folder of data that is safe to load from a stranger.

manifest.json        what it is, digests of every other file, the self-test
weights.safetensors  each tensor once; graphs of every precision take their weights from here
graphs/<engine>-<precision>/terms.pt2       target_logprob, mean_logprob
graphs/<engine>-<precision>/all_terms.pt2   these, and rank and entropy
tokenizer/           where the checkpoint has one
"""
