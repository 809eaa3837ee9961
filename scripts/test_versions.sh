#!/usr/bin/env bash
# Run the core of the test suite in a fresh environment, with the lowest, the newest or the locked versions of all
# dependencies that pyproject.toml allows.
#   scripts/test_versions.sh lowest|newest|locked [PYTHON]     PYTHON: an interpreter, such as python3.13
set -euo pipefail
cd "$(dirname "$0")/.."
versions=${1:?usage: scripts/test_versions.sh lowest|newest|locked [PYTHON]}
python=${2:-python3}

# What depends most on other packages: files of models and tokenizers, numerics against PyTorch, checkpoints, rows.
core=(
  tests/hub tests/objectives tests/test_cli.py tests/test_config.py
  tests/data/test_read.py tests/data/test_store.py tests/data/test_tokenise.py
  tests/evaluation/test_generate.py tests/evaluation/test_metrics.py tests/evaluation/test_pictures.py
  tests/models/test_encoders.py tests/models/test_transformer.py
  tests/training/test_against_torch.py tests/training/test_optimizer.py tests/training/test_run_folder.py
  tests/tuning/test_lora_peft.py tests/tuning/test_prompt.py
)

environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"$python" -m venv "$environment"
export PATH="$environment/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
case $versions in
  lowest)
    pip install --quiet uv
    python scripts/update_lock.py --lowest > "$environment/constraints.txt"
    constraints=(-c "$environment/constraints.txt")
    ;;
  newest) constraints=() ;;
  locked) constraints=(-c constraints.txt) ;;
  *) echo "expected lowest, newest or locked; found $versions" >&2; exit 2 ;;
esac
pip install --quiet -e ".[test]" ${constraints[@]+"${constraints[@]}"}
python --version
pip list --format=freeze | grep -E '^(jax|flax|optax|orbax-checkpoint|transformers|tokenizers|peft|torch|datasets|numpy)=='
python -m pytest -n 2 --dist loadfile "${core[@]}"
