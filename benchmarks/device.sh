#!/bin/bash
# The engine's benchmark on a GPU machine that has torch and no network.
#
#   benchmarks/device.sh wheels DIR PYTHON [HAS...]   where there is a network: collect wheels for
#       the GPU machine's Python ("3.12"), without the packages that it has ("numpy pillow")
#   benchmarks/device.sh run DIR OUTPUT.json [...]    on the GPU machine, in a copy of this folder:
#       nine minutes; writes OUTPUT.json and OUTPUT.md. One part alone takes a few minutes:
#       --architectures NAME... --parts PART... (see benchmarks/engine_device.py)
set -euo pipefail
cd "$(dirname "$0")/.."
# The imported packages. pip finds their dependencies, none of which requires torch.
packages='diffusers transformers pydantic-settings pillow structlog prometheus-client aiohttp opentelemetry-api pyparsing'
# This package requires torch, which the GPU machine has.
alone='compel'
# These packages serve downloads and many connections, which the benchmark does not use.
unneeded='hf_xet uvloop'
pip=(python3 -m pip --disable-pip-version-check -q)
word=$([ $# -lt 3 ] || echo "$1")
case "$word" in
wheels)
	wheels=$2 python=$3
	shift 3
	# shellcheck disable=SC2086
	"${pip[@]}" download --only-binary :all: --python-version "$python" -d "$wheels" \
		-c constraints.txt $packages -r benchmarks/litserve.txt
	"${pip[@]}" download --only-binary :all: --python-version "$python" -d "$wheels" \
		-c constraints.txt --no-deps $alone
	for name in $unneeded "$@"; do rm -f "$wheels/$name"-[0-9]*.whl; done
	du -sh "$wheels"
	;;
run)
	wheels=$2 output=$3
	shift 3
	"${pip[@]}" install --no-index --no-deps --upgrade --target .img2img/device "$wheels"/*.whl
	PYTHONPATH=.img2img/device:proto/gen:server:. python3 -m benchmarks.engine_device \
		--budget $((540 - SECONDS)) --output "$output" "$@"
	;;
*)
	sed -n '2,9s/^# \{0,1\}//p' "$0"
	exit 2
	;;
esac
