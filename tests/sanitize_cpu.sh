#!/bin/sh
# The CPU kernels built with gcc's sanitizers, under a program and the tests that run them. Usage: sanitize_cpu.sh PYTHON
# At -O3, because sums that are not vectorised are rounded differently.
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
compiler=${CC:-gcc}
flags="-std=gnu11 -O3 -g -fno-omit-frame-pointer -fopenmp-simd -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror -pthread"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

for each in gcc clang; do
    for set in x86-64 x86-64-v3 x86-64-v4; do
        command -v "$each" > /dev/null && [ "$(uname -m)" = x86_64 ] || continue
        echo "CPU kernels for $set: warnings of $each"
        "$each" $flags -march=$set -shared -fPIC -o "$folder/warned" kernels/cpu/*.c -lm
    done
done

echo "CPU kernels with -fsanitize=thread"
"$compiler" $flags -fsanitize=thread -Ikernels/cpu -o "$folder/threads" tests/backends/cpu_threads.c kernels/cpu/*.c -lm
TSAN_OPTIONS=halt_on_error=1 "$folder/threads"

cp -rL bench chunked_ce tests pyproject.toml "$folder"

run() {  # run SANITIZERS RUNTIME-LIBRARY TESTS...
    sanitizers=$1 runtime=$("$compiler" -print-file-name="$2")
    shift 2
    cxx=$("$compiler" -print-file-name=libstdc++.so.6)  # else an exception within torch ends the process
    echo "CPU kernels with -fsanitize=$sanitizers"
    rm -f "$folder"/chunked_ce/backends/cpu_*.bin
    "$compiler" $flags -shared -fPIC -fsanitize="$sanitizers" -fno-sanitize-recover=undefined -o "$folder/chunked_ce/backends/cpu_base.bin" kernels/cpu/*.c -lm
    (cd "$folder" && PYTHONPATH="$folder" LD_PRELOAD="$runtime $cxx" ASAN_OPTIONS=detect_leaks=0 \
        PYTHONMALLOC=malloc "$python" -m pytest -q -s --tb=short -p no:cacheprovider -p no:xdist "$@")
}

run address,undefined libasan.so tests/backends/test_backend_cpu.py tests/backends/test_backend_cpu_binary.py tests/functional/test_binary.py tests/functional/test_kl_div.py \
    tests/functional/test_token_stats.py tests/functional/test_drop_in.py \
    -k "(backend_cpu or cpu) and not compile and not instruction_sets"
