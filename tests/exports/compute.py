"""Load exports and print their logits, in any version of transformers and as any user.

    python compute.py TASKS.json ANSWERS.json [UID]

With UID it changes to that user, after having done everything once: that user may not be able to read the
Python installation, so all modules must be imported before. It imports nothing of this project.
"""

import json
import os
import sys

IDS = [1, 17, 300, 4, 2000, 55, 81, 9, 700, 23, 42, 1999, 5, 6, 7, 8, 1024, 77, 90, 3]
TEXT = "<|user|>Name three primary colors.<|assistant|>Red, blue & yellow.</s>"


def answer(folder, base=None, trust=False):
    """Return the logits of a model, or of an adapter on its base model, and the tokens of a text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"trust_remote_code": trust, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(base or folder, **options).float()
    if base:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    ids = torch.tensor([[token % model.config.vocab_size for token in IDS]])
    with torch.no_grad():
        logits = model.eval()(ids, use_cache=False).logits[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    chat = [{"role": "user", "content": "Hello"}]
    return {
        "logits": logits.tolist(),
        "tokens": tokenizer(TEXT)["input_ids"],
        "special": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token],
        "chat": tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
        "eos": model.generation_config.eos_token_id,
        "dtype": str(model.config.dtype if hasattr(model.config, "dtype") else model.config.torch_dtype),
    }


def answer_all(tasks):
    """Return an answer or an error by task."""
    answers = {}
    for name, task in tasks.items():
        try:
            answers[name] = answer(**task)
        except Exception as error:
            answers[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    return answers


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        tasks = json.load(file)
    import transformers

    if len(sys.argv) > 3:
        answer_all(tasks)
        os.setgroups([])
        os.setgid(int(sys.argv[3]))
        os.setuid(int(sys.argv[3]))
        os.environ["HF_MODULES_CACHE"] = "modules"
    answers = {"transformers": transformers.__version__, **answer_all(tasks)}
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main()
