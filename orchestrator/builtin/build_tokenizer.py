"""Regenerate the tokenizer of the built-in tiny Llama model.

The tokenizer is a byte-level BPE trained on the bundled sample rows, so it needs
no download and encodes any UTF-8 text. Run it with
``python -m orchestrator.builtin.build_tokenizer [directory]``; the same rows and the
same library versions give the same files byte for byte.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
SAMPLE_FILE = HERE / "alpaca_sample.jsonl"
MODEL_DIR = HERE / "tiny-llama"

VOCAB_SIZE = 2048
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (PAD, BOS, EOS, *ROLE_TOKENS)
MAX_LENGTH = 1_048_576

# Turns are divided by special tokens alone, so that the tokens of a prompt are always a
# prefix of the tokens of the whole conversation.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<|assistant|>' -}}
        {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
    {%- elif message['role'] in ('system', 'user') -%}
        {{- '<|' + message['role'] + '|>' + message['content'] -}}
    {%- else -%}
        {{- raise_exception('Unsupported role: ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def iter_texts(path: Path) -> Iterator[str]:
    """Yield every non-empty text field of a JSONL file of Alpaca rows.

    Args:
        path: File with one JSON object a line.

    Yields:
        The instruction, input and output texts, in file order.
    """
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row: dict[str, str] = json.loads(line)
            for key in ("instruction", "input", "output"):
                if row[key]:
                    yield row[key]


def build_tokenizer(sample: Path = SAMPLE_FILE) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE and wrap it for transformers.

    Args:
        sample: JSONL file of Alpaca rows to train on.

    Returns:
        The tokenizer, with special tokens and chat template set.

    Raises:
        ValueError: If the rows give fewer than ``VOCAB_SIZE`` entries.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    core.train_from_iterator(iter_texts(sample), trainer=trainer)
    if core.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"expected {VOCAB_SIZE} entries, got {core.get_vocab_size()}")
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    wrap: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return wrap(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=list(ROLE_TOKENS),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
        padding_side="right",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tokenizer files.

    Args:
        argv: Command-line arguments; None reads them from the process.
    """
    parser = argparse.ArgumentParser(description="Regenerate the built-in tokenizer.")
    parser.add_argument("directory", nargs="?", type=Path, default=MODEL_DIR)
    build_tokenizer().save_pretrained(parser.parse_args(argv).directory)


if __name__ == "__main__":
    main()
