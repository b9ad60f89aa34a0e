"""ICM-LoRA service: a task in words becomes a LoRA on a frozen base model."""
