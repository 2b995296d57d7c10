"""Job files that several tests of the loader read."""

WHOLE = """\
name: whole
model:
  path: builtin/tiny-llama
  weights: random
  dtype: fp32
data:
  train:
    - path: builtin/alpaca_sample
      repeat: 2
    - {path: other.jsonl}
  max_length: 512
parallel: {workers: 2, zero_stage: 3, offload_optimizer: cpu}
optim:
  lr: 2e-5
  micro_batch_size: 1
  global_batch_size: 8
  betas: [0.9, 0.95]
  max_steps: null
eval: {data: [{path: builtin/alpaca_sample_eval}], every_steps: 5}
checkpoint: {storage: runs, every_steps: 10}
run: {seed: 7}
metrics: {port: null}
"""
