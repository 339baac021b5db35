"""The tokenizer of the embedded language: one token a word, words split at spaces."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harvest.embedded import vocabulary as words
from harvest.embedded.corpus import WINDOW_TOKENS


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with the language's vocabulary. `...` is an ordinary word; nothing is added around a text."""
    tokenizer = Tokenizer(models.WordLevel(dict(words.TOKEN_ID), unk_token=words.UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=words.BOS,
        unk_token=words.UNKNOWN,
        model_max_length=WINDOW_TOKENS,
        clean_up_tokenization_spaces=False,
    )
