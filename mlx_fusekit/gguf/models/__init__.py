"""What llama.cpp calls the parts of each kind of model."""
