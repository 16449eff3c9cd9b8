# Prints a command that starts Python 3.12 or 3.13, or nothing. The versions that pyenv holds count too.
for python in python3.12 python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13.*/bin/python; do
  if "$python" -c 'import sys, venv; sys.exit(sys.version_info[:2] not in ((3, 12), (3, 13)))' 2>/dev/null; then
    echo "$python"
    exit 0
  fi
done
