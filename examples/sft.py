"""Train routers with TRL on packed conversations, calibrate them, and save the adapter.

    pip install "router-tuning[trl]"
    python examples/sft.py --model path/to/model --data chats.jsonl --out adapter

A row of the data is {"messages": [{"role": ..., "content": ...}, ...]} or {"text": ...}.
"""

import argparse

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import router_tuning as rt

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True, help="a local folder or a hub id")
parser.add_argument("--data", required=True, help="a .jsonl file")
parser.add_argument("--out", default="adapter", help="folder of the adapter")
parser.add_argument("--budget", type=float, default=0.8, help="fraction of attention to keep")
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--held-out", type=int, default=64, help="first rows, for calibration")
options = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(options.model)
tokenizer = AutoTokenizer.from_pretrained(options.model)
rows = load_dataset("json", data_files=options.data, split="train")
routers = rt.RouterTuningConfig(granularity="attn_token", kv="kept", budget=options.budget)
args = rt.RouterSFTConfig("runs", max_steps=options.steps, packing=True, max_length=512)
train = rows.select(range(options.held_out, len(rows)))
trainer = rt.RouterSFTTrainer(
    model, args, train_dataset=train, processing_class=tokenizer, peft_config=routers
)
trainer.train()
held_out = rt.load_examples(options.data, limit=options.held_out)
rt.calibrate(trainer.model, tokenizer, held_out, budgets=(0.9, options.budget))
trainer.save_model(options.out)
