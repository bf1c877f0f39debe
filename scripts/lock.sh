#!/bin/sh
# Write the lock files of CI anew, with the newest versions that go together; `make lock`.
#
#     sh scripts/lock.sh UV
#
# Each package's version and the hashes of its files, for every system and Python that we support.
set -eu

uv=${1:?usage: sh scripts/lock.sh UV}
cd "$(dirname "$0")/.."

lock() {
    name=$1
    shift
    UV_CUSTOM_COMPILE_COMMAND="make lock" "$uv" pip compile --quiet --upgrade --universal \
        --python-version 3.11 --generate-hashes --no-annotate \
        --output-file "requirements/$name.txt" "$@"
}

# What an environment begins with, and what builds our own package, are locked as well.
printf 'pip\nsetuptools\nhatchling\neditables\n' | lock ci pyproject.toml --group dev --group fuzz -
echo llama-cpp-python | lock llamacpp --constraint requirements/ci.txt -
# An environment of its own, with other versions of what we need too.
lock peft --group peft
lock tools --group lock
