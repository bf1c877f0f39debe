"""Publishing a fused model on the Hugging Face Hub."""
