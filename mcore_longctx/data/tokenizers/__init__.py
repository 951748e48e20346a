"""Tokenizers behind one interface, exact: Hugging Face, sentencepiece, tiktoken, and gigatoken where it gives the same ids."""

from mcore_longctx.data.tokenizers.tokenizer import Tokenizer, check_against_reference, check_vocabulary, load_tokenizer

__all__ = ["Tokenizer", "check_against_reference", "check_vocabulary", "load_tokenizer"]
