"""What a verification is asked to do."""

#: About how many tokens to run, by default.
MAX_TOKENS = 4096
