"""Texts to ids, by the tokenizers that lie in a bundle.

What is made of a text here is what transformers' tokenizer of the checkpoint makes of it: `seqloss
export` holds one against the other.
"""
