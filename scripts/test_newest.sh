#!/usr/bin/env bash
# Run the core of the test suite with the newest versions of all dependencies: scripts/test_newest.sh [PYTHON]
exec "$(dirname "$0")/test_versions.sh" newest "$@"
