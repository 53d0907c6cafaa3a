"""Makes data/quantised: blocks of GGUF's quantised types, and what the package gguf reads from them.
Needs gguf, numpy and safetensors:  python tests/golden/make_quantised_goldens.py [FOLDER]

golden.safetensors
  {type}.blocks   [blocks, bytes of a block] U8; random bits under finite scales, and the extremes of both
  {type}.values   [blocks, values of a block] F32, as gguf.quants.dequantize gives them
  source          [blocks, 32] F32; {type}.encoded [blocks, bytes of a block] U8, as gguf.quants.quantize gives them
tiny.gguf
  {type}          2 rows of each type, the first of {type}.blocks; with metadata of every type
"""
import sys
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "data"

# Where the f16 scales of a block lie.
SCALES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
ENCODED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
EXTREME_SCALES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0xFBFF]  # zeros, subnormal numbers, the largest

random = np.random.default_rng(20241)


def random_blocks(name):
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    count = 24 if values == 32 else 10
    blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
    blocks[0] = 0
    blocks[1] = 255
    for place in SCALES[name]:
        scales = random.normal(0, 0.02, count).astype(np.float16)
        scales[2 : 2 + len(EXTREME_SCALES)] = random.permutation(np.array(EXTREME_SCALES, np.uint16)).view(np.float16)
        blocks[:, place : place + 2] = scales.reshape(-1, 1).view(np.uint8)
    return blocks


def source_blocks():
    x = random.normal(0, 1, (40, 32)).astype(np.float32)
    x[0] = 0
    x[1] = -0.0
    x[2] = np.abs(x[2])
    x[3] = -np.abs(x[3])
    x[4] *= 1e-6  # scales below the normal numbers of f16
    x[5] *= 1e-9  # ... and below all
    x[6] *= 3e4
    x[7] = 2.5  # one value
    x[8] = np.arange(32) - 16
    x[9] = (np.arange(32) - 127) / 2  # ties
    x[10] = np.where(np.arange(32) % 2, 1.0, -1.0)  # two largest magnitudes
    x[11, 5] = 300
    return x


tensors = {"source": source_blocks()}
for name in SCALES:
    quantisation = GGMLQuantizationType[name]
    blocks = random_blocks(name)
    tensors[name.lower() + ".blocks"] = blocks
    tensors[name.lower() + ".values"] = dequantize(blocks, quantisation)
    assert np.isfinite(tensors[name.lower() + ".values"]).all()
    if name in ENCODED:
        tensors[name.lower() + ".encoded"] = quantize(tensors["source"], quantisation)
(OUT / "quantised").mkdir(parents=True, exist_ok=True)
save_file(tensors, OUT / "quantised" / "golden.safetensors")

writer = GGUFWriter(OUT / "quantised" / "tiny.gguf", "llama")
for kind, value in {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 4000000000, "int32": -70000, "uint64": 1 << 62,
                    "int64": -(1 << 62), "float32": 0.5, "float64": 0.1, "bool": True, "string": "h\u00e9"}.items():  # fmt: skip
    getattr(writer, "add_" + kind)("test." + kind, value)
writer.add_array("test.strings", ["<s>", "", "\u2581a"])
writer.add_array("test.integers", [1, -2, 3])
writer.add_array("test.numbers", [0.5, -1.5])
writer.add_tensor("vector", tensors["source"][8])
writer.add_tensor("half", tensors["source"][8:10].astype(np.float16))
for name in SCALES:
    writer.add_tensor(name.lower(), tensors[name.lower() + ".blocks"][:2], raw_dtype=GGMLQuantizationType[name])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
