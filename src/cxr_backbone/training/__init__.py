"""The two training phases: frozen backbone, then fine-tuning."""
