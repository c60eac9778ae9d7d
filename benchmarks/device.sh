#!/bin/bash
# The engine's benchmark on a GPU machine that has Python and torch and nothing else.
#
#   benchmarks/device.sh wheels DIR [PYTHON_VERSION]    where there is a network: collect wheels
#   benchmarks/device.sh run DIR OUTPUT.json [...]      on the GPU machine, in a copy of this folder
set -euo pipefail
cd "$(dirname "$0")/.."
# What benchmarks.engine_device imports, with what that needs, beside torch and what torch brings.
packages='accelerate|annotated-types|anyio|certifi|click|diffusers|filelock|fsspec|h11|hf-xet|httpcore
httpx|huggingface_hub|idna|importlib_metadata|numpy|packaging|pillow|psutil|pydantic|pydantic_core
pydantic-settings|python-dotenv|PyYAML|regex|requests|safetensors|shellingham|tokenizers|tqdm
transformers|typer|typing_extensions|typing-inspection|urllib3|charset-normalizer|zipp'
pip=(python3 -m pip --disable-pip-version-check -q)
case "${1:-}" in
wheels)
	options=(--only-binary :all:)
	[ -z "${3:-}" ] || options+=(--python-version "$3")
	mkdir -p "$2/engine" "$2/litserve"
	grep -iE "^(${packages//$'\n'/|})==" constraints.txt >"$2/engine/packages.txt"
	"${pip[@]}" download "${options[@]}" --no-deps -d "$2/engine" -r "$2/engine/packages.txt"
	"${pip[@]}" download "${options[@]}" -d "$2/litserve" -r benchmarks/litserve.txt
	du -sh "$2"
	;;
run)
	wheels=$2 output=$3
	shift 3
	"${pip[@]}" install --no-index --no-deps --upgrade --target .img2img/device "$wheels"/engine/*.whl
	PYTHONPATH=.img2img/device:proto/gen:server:. python3 -m benchmarks.engine_device \
		--wheels "$wheels/litserve" --output "$output" "$@"
	;;
*)
	sed -n '2,5s/^# \{0,1\}//p' "$0"
	exit 2
	;;
esac
