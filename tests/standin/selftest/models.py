"""A GLM-4 on the device: forward, backward, training, decoding, saving, and the package's own dispatch modes."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from numerics_suite.engine.rounded_reference import run_rounded
from numerics_suite.engine.true_fp64 import run_true_fp64

FIXTURES = Path(__file__).parents[3] / "fixtures"
IDS = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_fill(1, torch.arange(2), 0)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.02}


def load(attention="sdpa", dtype=torch.float32, name="glm4-tiny", device="standin"):
    loader = AutoModelForSequenceClassification if name.endswith("classifier") else AutoModelForCausalLM
    options = {"trust_remote_code": True} if "chatglm" in name else {"attn_implementation": attention}
    return loader.from_pretrained(FIXTURES / name, dtype=dtype, **options).to(device).eval()


def batch(device="standin"):
    return {"input_ids": IDS.to(device), "attention_mask": MASK.to(device)}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_outputs_agree_with_the_cpu(attention, dtype):
    expected = load(attention, dtype, device="cpu")(**batch("cpu")).logits
    found = load(attention, dtype)(**batch()).logits
    real = MASK.bool()
    torch.testing.assert_close(found.cpu()[real], expected[real], atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("name", ["glm-tiny", "chatglm-tiny", "glm4-tiny-classifier", "chatglm-tiny-classifier"])
def test_other_models_agree_with_the_cpu(name):
    expected = load(name=name, device="cpu")(**batch("cpu")).logits
    found = load(name=name)(**batch()).logits
    torch.testing.assert_close(found.cpu()[-1], expected[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "amp"), [(torch.bfloat16, True), (torch.float16, True), (torch.bfloat16, False)], ids=str
)
@pytest.mark.parametrize("device", ["standin:0", "standin:1"])
def test_training_follows_the_cpu(dtype, amp, device):
    losses = []
    for where in ("cpu", device):
        kind = torch.device(where).type
        model = load(dtype=torch.float32 if amp else dtype, device=where).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler(kind, enabled=amp and dtype is torch.float16)
        for _ in range(3):
            with torch.autocast(kind, dtype=dtype, enabled=amp):
                loss = model(input_ids=IDS.to(where), labels=IDS.to(where)).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_decoding_saving_copying_and_checkpointing(tmp_path):
    model = load()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = load(device="cpu").generate(**batch("cpu"), **options)
    assert torch.equal(model.generate(**batch(), **options).cpu(), expected)

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="standin")
    assert again.device == torch.device("standin:0")
    for found, stored in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, stored)

    twin = copy.deepcopy(model).double()
    torch.testing.assert_close(twin(**batch()).logits[:, 2:].float(), model(**batch()).logits[:, 2:], atol=1e-3, rtol=0)

    gradients = []
    for checkpointing in (False, True):
        trained = load().train()
        if checkpointing:
            trained.gradient_checkpointing_enable({"use_reentrant": False})
        trained(input_ids=IDS.to("standin"), labels=IDS.to("standin"), use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in trained.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("run", [run_true_fp64, run_rounded])
def test_the_references_run_on_the_device(run, attention):
    results = [
        run(load(attention, device=device), {**batch(device), "labels": IDS.to(device)}, gradients=True)
        for device in ("cpu", "standin")
    ]
    expected, found = results
    assert found.outputs["logits"].device.type == "standin"
    tolerance = 1e-9 if run is run_true_fp64 else 1e-4
    real = MASK.bool()
    torch.testing.assert_close(
        found.outputs["logits"].cpu()[real], expected.outputs["logits"][real], atol=tolerance, rtol=0
    )
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name].cpu(), gradient, atol=tolerance, rtol=tolerance)
