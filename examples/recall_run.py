"""One run of `recall.py`: train a model, ask it what it remembers, return the row."""

import signal
import time
import traceback
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

import torch
from recall_tasks import END_OF_CALL, IGNORED, Sizes, batch_of, matched_config, passkey_batch, recall_batch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

import hf_memory
from hf_memory.kernels import force_form


EVERY = 50
"""Steps per point of a curve."""
RESERVE = {"recall": 6.0, "passkey": 25.0}
"""Seconds that a run keeps for asking, where the whole call has an end."""
TOKENS_AT_A_TIME = {"cpu": 2**15, "cuda": 2**17}
TRAINING_SEEDS, HELD_OUT_SEED = 1000, 2**31


@dataclass(frozen=True)
class Setting:
    """How runs are made; nothing here changes what is computed.

    Attributes:
        device: `"cpu"` or `"cuda"`.
        seconds: of training; a run stops there, wherever it is.
        until: when the whole call has to end, `time.time()`.
        graph: forward and backward as one CUDA graph.
        triton: matrix memories run in their Triton form; all else runs in the chunk form.
    """

    device: str
    seconds: float
    until: float
    graph: bool
    triton: bool


class GraphError(RuntimeError):
    """A model that cannot be captured, or whose graph computes something else."""


class Step:
    """Loss, share of right answers and gradients of a batch: eager, or one CUDA graph."""

    def __init__(self, model: PreTrainedModel, batch: tuple[Tensor, Tensor], graph: bool) -> None:
        self.model, self.graph = model, None
        self.ids, self.labels = (x.clone() for x in batch)
        if graph:
            try:
                self._capture()
            except Exception as error:  # whatever keeps a model out of a graph, it trains without one
                raise GraphError(short(error)) from error

    def __call__(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.model.zero_grad(set_to_none=self.graph is None)
        self.ids.copy_(ids)
        self.labels.copy_(labels)
        if self.graph is None:
            return self._eager()
        self.graph.replay()
        return tuple(x.clone() for x in self.out)

    def _eager(self) -> tuple[Tensor, Tensor]:
        logits = self.model(input_ids=self.ids, use_cache=False).logits[:, :-1].float()
        labels = self.labels[:, 1:]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        asked = labels != IGNORED
        right = ((logits.argmax(-1) == labels) & asked).sum() / asked.sum()
        loss.backward()
        return loss.detach(), right

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.model.zero_grad(set_to_none=True)
                self._eager()
        torch.cuda.current_stream().wait_stream(stream)
        expected = [p.grad.clone() for p in self._trained()]
        # The graph adds to the gradients that are there, so that the optimiser finds them where they were.
        self.model.zero_grad(set_to_none=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.out = self._eager()
        self.model.zero_grad(set_to_none=False)
        graph.replay()
        off = sum((p.grad - e).square().sum() for p, e in zip(self._trained(), expected))
        off = float((off / sum(e.square().sum() for e in expected)).sqrt())
        if not off < 1e-2:
            raise RuntimeError(f"gradients of the graph are {off:.1e} off")
        self.graph = graph

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.grad is not None]


@torch.no_grad()
def accuracy(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> float:
    """Share of the asked tokens that are the likeliest."""
    parts = ids.split(max(1, TOKENS_AT_A_TIME[ids.device.type] // ids.shape[1]))
    guesses = torch.cat([model(input_ids=part, use_cache=False).logits[:, :-1].argmax(-1) for part in parts])
    asked = labels[:, 1:] != IGNORED
    return float((guesses == labels[:, 1:])[asked].float().mean())


def evaluate(model: PreTrainedModel, task: str, sizes: Sizes) -> dict[str, float]:
    """Accuracy at every length that a task is asked at, on inputs that no run was trained on."""
    generator = torch.Generator(model.device).manual_seed(HELD_OUT_SEED)
    if task == "recall":
        length = 4 * sizes.pairs
        return {str(length): accuracy(model, *recall_batch(sizes, sizes.held_out // 8 // length, generator))}
    found = {}
    for length in sizes.lengths:
        rows = min(128, max(2, sizes.held_out // length))
        found[str(length)] = accuracy(model, *passkey_batch(length, rows, generator))
    return found


@torch.no_grad()
def state_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Size of the cache of one row behind `tokens` tokens."""
    cache = model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device=model.device), use_cache=True)
    cache = cache.past_key_values
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def fit(model: PreTrainedModel, run: dict, sizes: Sizes, setting: Setting) -> dict:
    """Train; the part of the row that says how it went."""
    fused = {"fused": True} if setting.device == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=run["lr"], betas=(0.9, 0.95), weight_decay=0.1, **fused)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run["lr"], total_steps=sizes.steps + 1, pct_start=0.1)
    generator = torch.Generator(setting.device).manual_seed(TRAINING_SEEDS + run["seed"])
    step = Step(model, batch_of(run["task"], sizes, generator), setting.graph)
    start, done, curve, found = time.time(), 0, [], {"cut": None}
    end, last = start + setting.seconds, setting.until - RESERVE[run["task"]]
    while done < sizes.steps and found["cut"] is None:
        points = []
        while len(points) < min(EVERY, sizes.steps - done) and (not points or time.time() < min(end, last)):
            points.append(torch.stack(step(*batch_of(run["task"], sizes, generator))))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        done += len(points)
        loss, right = torch.stack(points).mean(0).tolist()
        curve.append([done, round(loss, 4), round(right, 4)])
        if loss != loss:
            found["cut"] = "the loss is not a number"
        elif done < sizes.steps and time.time() >= min(end, last):
            found["cut"] = END_OF_CALL if last < end else "seconds"
    return found | {"curve": curve, "steps": done, "seconds": round(time.time() - start, 1)}


def train(run: dict, sizes: Sizes, setting: Setting) -> dict:
    """Train one model and ask it; its row."""
    set_seed(run["seed"])
    config = matched_config(run["model"], run["task"], run["width"], sizes)
    model = AutoModelForCausalLM.from_config(config).to(setting.device)
    triton = setting.triton and getattr(config, "memory_depth", 2) == 1
    with nullcontext() if triton else force_form("chunk"):
        size = state_bytes(model.eval(), 4 * sizes.pairs if run["task"] == "recall" else sizes.context)
        fitted = fit(model.train(), run, sizes, setting)
        start = time.time()
        shares = evaluate(model.eval(), run["task"], sizes)
    cpu = f"cpu, {torch.get_num_threads()} threads"
    return run | fitted | {
        "accuracy": shares,
        "seconds_asking": round(time.time() - start, 1),
        "parameters": model.num_parameters(),
        "state_bytes": size,
        "graph": setting.graph,
        "form": "triton" if triton else "chunk",
        "sizes": asdict(sizes),
        "torch": torch.__version__,
        "hf_memory": hf_memory.__version__,
        "device": torch.cuda.get_device_name() if setting.device == "cuda" else cpu,
    }  # fmt: skip


def short(error: Exception) -> str:
    """The end of an error's traceback."""
    return "".join(traceback.format_exception(error))[-1500:]


def work(connection: Connection, threads: int) -> None:
    """Process that makes runs: `(run, sizes, setting)` comes in, a row goes out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    while True:
        try:
            run, sizes, setting = connection.recv()
        except EOFError:  # nobody is there to ask for more
            return
        try:
            row = train(run, sizes, setting)
        except GraphError as error:
            row = run | {"graph_error": str(error)}
        except Exception as error:  # a failure is a row, and the other runs go on
            row = run | {"error": short(error)}
        connection.send(row)
