"""What calm saves opens in PyTorch and gives calm's logits: models in transformers, adapters by examples/python/calm_adapter.py.

python test_adapter.py [PROGRAM]: the built write_composition; by default the one in the folder CALM_BUILD_DIR.
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

ROOT = Path(os.environ.get("CALM_SOURCE_DIR", Path(__file__).resolve().parents[2]))
SCRIPT = ROOT / "examples" / "python" / "calm_adapter.py"
sys.path.insert(0, str(SCRIPT.parent))
from calm_adapter import compose  # noqa: E402

MODELS = ["anchor", "augment_0", "augment_1"]
ADAPTERS = ["adapter_default", "adapter_tanh"]


def open_model(folder):
    model, info = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    strange = {kind: keys for kind, keys in info.items() if keys}
    assert not strange, f"{folder}: transformers found {strange}"
    return model.eval()


def open_models(folder):
    return [open_model(folder / name) for name in MODELS]


def logits_of(model, ids, **inputs):
    with torch.no_grad():
        return model(torch.as_tensor(ids), use_cache=False, **inputs).logits


def check_same(found, expected, what):
    error = float((found - expected).abs().max() / expected.abs().max())
    print(f"{what}: differs by {error:.1e} of the largest value")
    assert error < 1e-5, what


def transformers_opens_the_saved_models(folder, expected, ids):
    for name in MODELS:
        check_same(logits_of(open_model(folder / name), [ids])[0], expected[name], f"{name} in transformers")


def compose_gives_the_logits_of_calm(folder, expected, ids):
    for name in ADAPTERS:
        assert (expected[name] - expected["anchor"]).abs().max() > 0.1, f"the bridges of {name} add next to nothing"
        anchor, *augments = open_models(folder)
        composition = compose(anchor, augments, folder / name)
        check_same(logits_of(anchor, [ids])[0], expected[name], f"{name} by compose()")
        composition.remove()
        check_same(logits_of(anchor, [ids])[0], expected["anchor"], f"the anchor after {name} was removed")


def the_script_gives_the_logits_of_calm(folder, expected, ids):
    for name in ADAPTERS:
        command = [sys.executable, SCRIPT, "--anchor", folder / "anchor", "--adapter", folder / name, "--ids"]
        command += [",".join(map(str, ids)), "--augment", folder / "augment_0", "--augment", folder / "augment_1"]
        out = folder / f"{name}.safetensors"
        subprocess.run([*command, "--out", out], check=True, stderr=subprocess.DEVNULL)
        check_same(load_file(out)["logits"], expected[name], f"{name} by the script")
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
        assert printed.split()[:2] == ["argmax", str(int(expected[name][-1].argmax()))], printed


def padding_changes_no_logits(folder, expected, ids):
    anchor, *augments = open_models(folder)
    compose(anchor, augments, folder / "adapter_default")
    length, padding = len(ids), [0, 0, 0]
    rows = torch.tensor([ids + padding, padding + ids])
    mask = torch.tensor([[1] * length + [0] * 3, [0] * 3 + [1] * length])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits_of(anchor, rows, attention_mask=mask, position_ids=positions)
    check_same(found[0, :length], expected["adapter_default"], "padded on the right")
    check_same(found[1, 3:], expected["adapter_default"], "padded on the left")


def generation_works_without_a_cache_and_refuses_one(folder, expected, ids):
    anchor, *augments = open_models(folder)
    compose(anchor, augments, folder / "adapter_default")
    options = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, attention_mask=torch.ones(1, len(ids), dtype=torch.long))
    text = list(ids)
    for _ in range(3):
        text.append(int(logits_of(anchor, [text])[0, -1].argmax()))
    assert anchor.generate(torch.tensor([ids]), use_cache=False, **options)[0].tolist() == text
    try:
        anchor.generate(torch.tensor([ids]), use_cache=True, **options)
    except ValueError as error:
        assert "use_cache=False" in str(error)
    else:
        raise AssertionError("generation with a cache was not refused")


def the_bridges_train_and_keep_the_names_of_the_file(folder, expected, ids):
    anchor, *augments = open_models(folder)
    composition = compose(anchor, augments, folder / "adapter_tanh")
    stored = load_file(folder / "adapter_tanh" / "adapter_model.safetensors")
    state = composition.state_dict()
    assert state.keys() == stored.keys(), state.keys() ^ stored.keys()
    assert all(state[name].shape == stored[name].shape for name in stored)
    anchor(torch.tensor([ids]), use_cache=False).logits.logsumexp(-1).sum().backward()
    for name, parameter in composition.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"{name} has no gradient"
    assert all(parameter.grad is None for augment in augments for parameter in augment.parameters())


def other_models_are_refused(folder, expected, ids):
    anchor, *augments = open_models(folder)
    for wrong in ([*augments, anchor], [augments[0], anchor, augments[1]], [anchor, augments[0]]):
        try:
            compose(wrong[0], wrong[1:], folder / ADAPTERS[0])
        except ValueError as error:
            print(f"refused: {error}")
        else:
            raise AssertionError("an adapter was opened over other models")


def main():
    disable_progress_bar()
    torch.set_num_threads(1)
    default = Path(os.environ.get("CALM_BUILD_DIR", ROOT / "build" / "release")) / "tests" / "python" / "write_composition"
    program = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([program, folder], check=True)
        expected = load_file(folder / "logits.safetensors")
        ids = [int(i) for i in expected.pop("ids")]
        for test in (transformers_opens_the_saved_models, compose_gives_the_logits_of_calm,
                     the_script_gives_the_logits_of_calm, padding_changes_no_logits,
                     generation_works_without_a_cache_and_refuses_one, the_bridges_train_and_keep_the_names_of_the_file,
                     other_models_are_refused):
            print(f"-- {test.__name__.replace('_', ' ')}")
            test(folder, expected, ids)


if __name__ == "__main__":
    main()
