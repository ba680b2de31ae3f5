"""What every trained stage shares. May import data and config.

stage_trainer.py  transformers' Trainer with our order of data, normalisation, checkpoints and stopping
loop.py           the same for stages that do not use it; memory peaks, interrupts
checkpointing.py  checkpoints that are whole or absent
log.py            logs, trackers, figures of a stage
losses.py         cross-entropy and distillation in chunks
launcher.py       what a launcher may say; mixed_precision.py, the way out of accelerate's
"""
