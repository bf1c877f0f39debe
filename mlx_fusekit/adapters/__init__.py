"""Reading adapters into one form, whatever format they came in."""
