#!/bin/sh
# Lines of the CPU kernels that the CPU backend's tests reach, by gcov. Usage: coverage_c.sh PYTHON [LEAST-PER-CENT]
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3} least=${2:-95} root=$(pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
flags="-std=gnu11 -O1 -g -fopenmp-simd -fno-math-errno -fno-trapping-math --coverage -fprofile-update=atomic -pthread"

cp -rL bench chunked_ce tests pyproject.toml "$folder"
rm -f "$folder"/chunked_ce/backends/cpu_*.bin
mkdir "$folder/objects"
cd "$folder/objects"
for each in "$root"/kernels/cpu/*.c; do
    gcc $flags -fPIC -c "$each"
done
gcc --coverage -shared -pthread -o "$folder/chunked_ce/backends/cpu_base.bin" ./*.o -lm

cd "$folder"
failed=0
# More than one thread, for rows are cut into segments where they are fewer than threads.
OMP_NUM_THREADS=4 PYTHONPATH="$folder" "$python" -m pytest -q --tb=short -p no:cacheprovider -p no:xdist \
    tests/backends/test_backend_cpu*.py tests/functional/test_binary.py tests/functional/test_kl_div.py \
    tests/functional/test_token_stats.py tests/functional/test_drop_in.py tests/functional/test_grad_in_forward.py \
    tests/core/test_stats.py tests/fuzz/test_fuzz_shards.py \
    -k "(backend_cpu or cpu) and not compile and not instruction_sets and not number_of_threads and not long" || failed=$?

cd "$folder/objects"
gcov -r -s "$root" ./*.gcda > lines
# "File 'kernels/cpu/run.c'", then "Lines executed:97.50% of 40"
awk -v least="$least" -F "[':% ]" '
    /^File / { name = $3 }
    /^Lines executed/ && name ~ /kernels\/cpu/ {
        printf "%6.2f %% of %3d lines  %s\n", $3, $6, name
        covered += $3 * $6 / 100; total += $6; name = ""
    }
    END {
        printf "%6.2f %% of %3d lines in all\n", 100 * covered / total, total
        exit 100 * covered < least * total
    }' lines || failed=$?
grep -E "^ *(#####|=====)" ./*.gcov || true # the lines that nothing reaches
exit "$failed"
