"""Tokenise rows with TRL's SFTTrainer and with a plain `datasets.map` pipeline, on two processes each.

Usage: tokenise.py ROWS.jsonl TOKENIZER_FOLDER
"""

import json
import sys
import tempfile
import time
from importlib.metadata import version

import datasets
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

datasets.disable_caching()
datasets.disable_progress_bars()
PROCESSES = 2


def messages_of(row):
    question = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
    return {"prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": row["output"]}]}  # fmt: skip


def with_trl(rows, tokenizer):
    """Prepare prompt-completion rows as SFTTrainer does at its start."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16,
                                         num_hidden_layers=1, num_attention_heads=1))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(output_dir=folder, dataset_num_proc=PROCESSES, max_length=None, use_cpu=True,
                              report_to="none")  # fmt: skip
        few = Dataset.from_list(rows[:8]).map(messages_of, remove_columns=list(rows[0]))
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=few, processing_class=tokenizer)
        started = time.perf_counter()
        dataset = Dataset.from_list(rows).map(messages_of, remove_columns=list(rows[0]), num_proc=PROCESSES)
        done = trainer._prepare_dataset(dataset, tokenizer, arguments, False, None, "train")
        return time.perf_counter() - started, sum(len(ids) for ids in done["input_ids"])


def with_map(rows, tokenizer, batched):
    """Render, tokenise and mask the way most fine-tuning scripts do: two calls of the tokenizer in a
    `map`."""

    def encode(batch):
        columns = [batch[name] for name in ("instruction", "input", "output")]
        pairs = [messages_of(dict(zip(("instruction", "input", "output"), row, strict=True)))
                 for row in zip(*columns, strict=True)]  # fmt: skip
        prompts = [tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
                   for pair in pairs]  # fmt: skip
        wholes = [tokenizer.apply_chat_template(pair["prompt"] + pair["completion"], tokenize=False)
                  for pair in pairs]  # fmt: skip
        ids = tokenizer(wholes, add_special_tokens=False)["input_ids"]
        sizes = [len(each) for each in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
        labels = [[-100] * size + row[size:] for row, size in zip(ids, sizes, strict=True)]
        return {"input_ids": ids, "labels": labels}

    def encode_one(row):
        found = encode({name: [value] for name, value in row.items()})
        return {name: values[0] for name, values in found.items()}

    started = time.perf_counter()
    done = Dataset.from_list(rows).map(encode if batched else encode_one, batched=batched,
                                       remove_columns=list(rows[0]), num_proc=PROCESSES)  # fmt: skip
    return time.perf_counter() - started, sum(len(ids) for ids in done["input_ids"])


def main():
    path, folder = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    results = {}
    for name, run in {
        "TRL SFTTrainer": lambda: with_trl(rows, tokenizer),
        "datasets.map, row by row": lambda: with_map(rows, tokenizer, False),
        "datasets.map, batched": lambda: with_map(rows, tokenizer, True),
    }.items():
        seconds, tokens = run()
        results[name] = {"rows_per_second": len(rows) / seconds, "seconds": seconds, "tokens": tokens}
    versions = {name: version(name) for name in ("trl", "datasets", "transformers", "tokenizers")}
    sys.stdout.write(json.dumps({"results": results, "versions": versions}) + "\n")


if __name__ == "__main__":
    main()
