"""Generated adapters: PEFT directories, cached records, slots of the bank."""
