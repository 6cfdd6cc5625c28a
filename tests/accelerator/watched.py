"""What the watch does on the stand-in, run in a process that has it; the first line that fails ends it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerator.loud import make
from torch import nn

import numerics_suite
from numerics_suite.devices.host_copy import copy_to_host
from numerics_suite.training_watch.async_metrics import Mailbox
from numerics_suite.training_watch.norms import total_norm

HERE, THERE = "standin:0", "standin:1"


class Spread(nn.Module):
    """Two layers, the second of them on another device, and a scale on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4).to(HERE), nn.Linear(4, 4).to(THERE)
        self.scale = nn.Parameter(torch.ones((), device="cpu"))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.second(self.first(x.to(HERE)).to(THERE)) * self.scale.to(THERE)
        return {"logits": logits, "loss": logits.square().mean()}


def a_copy_is_read_after_its_event() -> None:
    value = torch.full((3,), 7.0, device=HERE)
    host, event = copy_to_host(value)
    assert event is not None
    assert host.tolist() != [7.0] * 3, "read before its event, a copy is what lay there before"
    event.synchronize()
    assert host.tolist() == [7.0] * 3


def figures_of_several_devices_arrive_whole() -> None:
    mailbox = Mailbox()
    values = [("a", torch.tensor(1.5)), ("b", torch.tensor(2.5, device=HERE)), ("c", torch.tensor(3.5, device=THERE))]
    mailbox.post(1, values)
    (reading,) = mailbox.ready(wait=True)
    assert reading.values == {"a": (1.5,), "b": (2.5,), "c": (3.5,)}
    norm = total_norm([torch.full((4,), 2.0), torch.full((4,), 2.0, device=HERE), torch.full((1,), 2.0, device=THERE)])
    assert norm is not None
    assert float(norm) == 6.0


def a_spread_model_is_watched() -> None:
    model = Spread()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with numerics_suite.watch(model, optimizer) as watch:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(2, 4))["loss"].backward()
            optimizer.step()
    assert watch.finding is None


def a_bad_step_is_caught(folder: Path) -> None:
    """In an autocast section; its bundle is opened on the CPU by the test."""
    model = make()[0].to(HERE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    try:
        with numerics_suite.watch(model, optimizer, bundle=folder, snapshot_every=1):
            for step in range(4):
                optimizer.zero_grad()
                batch = torch.full((2, 4), 9.0 if step == 2 else 1.0, device=HERE)
                with torch.autocast("standin", dtype=torch.bfloat16):
                    loss = model(batch)["loss"]
                loss.backward()
                optimizer.step()
    except numerics_suite.NumericsError as error:
        sys.stdout.write(f"caught: {error}\n")


if __name__ == "__main__":
    a_copy_is_read_after_its_event()
    figures_of_several_devices_arrive_whole()
    a_spread_model_is_watched()
    torch.set_default_device(HERE)
    figures_of_several_devices_arrive_whole()
    a_spread_model_is_watched()
    a_bad_step_is_caught(Path(sys.argv[1]))
    sys.stdout.write("done\n")
