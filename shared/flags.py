"""What to do here for the flags of diffusers' train_cogvideox_*lora.py that are no field under that name."""

BATCH = "train.global_batch_size is the clips of an optimizer step, and train.max_tokens_per_pack cuts it to fit"
PUSH = "upload the folder `export` of the run with `hf upload`"
PREVIEWS = "data.validation_prompts and train.preview_steps (optimizer steps) make previews"
INSTEAD = {
    "cache_dir": "it is model.model_cache_dir",
    "dataloader_num_workers": "one reader in the background, always",
    "gradient_accumulation_steps": BATCH,
    "hub_model_id": PUSH,
    "hub_token": "never a field: log in with `hf auth login`, or set HF_TOKEN",
    "logging_dir": "the tracker writes into train.output_dir, under train.tracker_name",
    "num_validation_videos": PREVIEWS,
    "push_to_hub": PUSH,
    "rank": "it is train.lora_rank",
    "scale_lr": "train.learning_rate is taken as it is",
    "train_batch_size": BATCH,
    "use_8bit_adam": "it is train.optimizer = 'adamw8bit'",
    "validation_epochs": PREVIEWS,
    "validation_images": "previews begin with the first frames of held-out clips; `precog sample` takes sample.images",
    "validation_prompt": PREVIEWS,
    "validation_prompt_separator": "data.validation_prompts is a list",
}
