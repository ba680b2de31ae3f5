"""What is done to a model, one stage at a time. May import hub, evaluation, conversion, training, data and config.

kinds/            what a run can have as a stage, one file for each kind; the work is in the files beside
transfer.py       attention transfer, layer by layer (transfer_loss.py)
calibration.py    least squares and key fitting (calibration_cosine.py, calibration_landmark.py, calibration_report.py)
adaptation.py     range scalers fitted to statistics
select.py         measures layers and places windows (select_measure.py, select_place.py, select_plan.py)
finetuning.py     LoRA (adapters.py) with a teacher (distillation.py); finetuning_trainer.py, finetune_lengths.py
full_training.py  all weights, or the mechanism alone (full_trainers.py)
opening.py        how the stages with a Trainer begin; trial.py, a measured micro-batch before they do
encoder_training.py, glue_training.py
identity.py       what a stage was made of, and what may differ when it goes on
pairs.py          which stages a mechanism on a backbone can have
"""
