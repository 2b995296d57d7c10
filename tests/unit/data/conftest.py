"""Tokenizer fixtures for the tests of `orchestrator.data`."""

from typing import Any

import pytest

from orchestrator.config.paths import resolve
from tests.unit.data.talks import TOOL_TEMPLATE, with_template, without_marks


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(resolve("builtin/tiny-llama")))


@pytest.fixture(scope="module")
def unmarked(tokenizer: Any) -> Any:
    """The tokenizer with its template stripped of `{% generation %}` marks."""
    return with_template(tokenizer, without_marks(tokenizer.chat_template))


@pytest.fixture(scope="module")
def tool_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer with TOOL_TEMPLATE, including its `{% generation %}` marks."""
    own = with_template(tokenizer, TOOL_TEMPLATE)
    own.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return own


@pytest.fixture(scope="module")
def metaspace_tokenizer() -> Any:
    """A SentencePiece-like tokenizer: Unigram, Metaspace, and a post-processor that prepends <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>")
    texts = ["name a colour and say why", "blue is the colour of the sky", "be brief and kind . , ? !"]
    backend.train_from_iterator(texts * 20, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=(
            "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
            "{{ '[INST] ' + message.content + ' [/INST]' }}{% else %}{{ ' ' + message.content + eos_token }}"
            "{% endif %}{% endfor %}"
        ),
    )
