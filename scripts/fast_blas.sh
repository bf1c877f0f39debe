#!/bin/sh
# Print the path of OpenBLAS, to be preloaded: MLX's Linux wheel links the reference BLAS, which
# is some 80 times slower in float32. Prints nothing where it is not installed, as on macOS.
#
#     LD_PRELOAD=$(sh scripts/fast_blas.sh) python ...
#     sh scripts/fast_blas.sh install    # first installs Debian's package, when run by root
set -eu

package=libopenblas0-pthread

path() {
    for library in /usr/lib/"$(uname -m)"-*/openblas-pthread/libopenblas.so.0; do
        if [ -e "$library" ]; then
            echo "$library"
            return
        fi
    done
}

install() {
    if ! command -v apt-get >/dev/null 2>&1; then
        return
    fi
    if [ "$(id -u)" -ne 0 ]; then
        echo "Without OpenBLAS this is slow; to install it: sudo apt-get install $package" >&2
        return
    fi
    echo "Installing Debian's $package, because MLX's own BLAS is slow on Linux" >&2
    export DEBIAN_FRONTEND=noninteractive
    # A list that cannot be updated matters only if the package is not found in the others.
    if ! { apt-get update -qq || true; apt-get install -qq -y --no-install-recommends "$package"; } \
        >/dev/null </dev/null; then
        echo "warning: $package could not be installed; going on without it" >&2
    fi
}

if [ "${1:-}" = install ] && [ -z "$(path)" ]; then
    install
fi
path
