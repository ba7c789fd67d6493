"""Updates per second of the agents, against a plain PyTorch implementation of the same updates in the same run.

    pip install -r requirements-benchmark.txt
    python -m benchmarks.training [--cases iql cpl decision] [--compile] [--json FILE]

Both begin with the same parameters, draw minibatches of the same data inside the loop that is timed, and use all cores
(or the GPU). First they make the same few updates on the same batches, and the program stops if their losses differ.
Then they run in turn, a window each; a ratio is the median over windows that followed each other, so that what else the
machine does slows neither alone. The peer is eager, in two forms: "torch" as the published implementations are written,
with an optimiser of its own for each network and Adam as it comes; "fused" as one would write it for speed, with one
backward pass and one fused Adam for all networks, and no block of a transformer computed for tokens that nobody reads.
`--compile` adds the latter under torch.compile.

The last in turn is a bare matrix product of JAX's, of the sizes of a hidden layer: "of products" is how much of its
FLOP/s the updates reach, counting three times the forward pass for what is trained and once for what is not. Below the
table are eight seeds trained as one program, against one. `taskset --cpu-list 0 python -m benchmarks.training` measures
one core, which suits a machine on which others work as well.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from agents.cpl import CPLAgent, CPLConfig
from agents.decision_transformer import DecisionTransformerAgent, DecisionTransformerConfig
from agents.iql import IQLAgent, IQLConfig
from agents.piql import PIQLAgent, PIQLConfig
from agents.reward_model import RewardModelAgent, RewardModelConfig
from robopref.agent import create_seeds, num_parameters, update_many
from robopref.datasets import PreferenceDataset, SegmentTable, TransitionDataset, WindowDataset
from robopref.types import PyTree

try:
    import torch
except ImportError as error:
    raise SystemExit("PyTorch is what this compares with: pip install -r requirements-benchmark.txt") from error

OBSERVATIONS, ACTIONS, ROWS, LENGTH, SEEDS = 39, 4, 50_000, 64, 8
WINDOW, EPISODE = 20, 1000
LEARNING_RATE = 3e-4
ON_GPU = jax.default_backend() == "gpu"
DEVICE = "cuda" if ON_GPU else "cpu"

Losses = dict[str, torch.Tensor]
Form: TypeAlias = Literal["torch", "fused", "compiled"]
Kind: TypeAlias = Literal["pairs", "transitions", "windows"]


# The data, once for both.


def make_transitions() -> TransitionDataset:
    rng = np.random.default_rng(0)
    return TransitionDataset(
        observations=jnp.asarray(rng.normal(size=(ROWS, OBSERVATIONS)), jnp.float32),
        actions=jnp.asarray(rng.uniform(-1, 1, (ROWS, ACTIONS)), jnp.float32),
        rewards=jnp.asarray(rng.normal(size=ROWS), jnp.float32),
        terminated=jnp.asarray(rng.uniform(size=ROWS) < 0.01),
        rows=jnp.arange(ROWS - 1, dtype=jnp.int32),
    )


def make_pairs() -> PreferenceDataset:
    rng, steps = np.random.default_rng(1), make_transitions()
    rows = jnp.asarray(rng.integers(0, ROWS - LENGTH, (2500, 2)), jnp.int32)
    table = SegmentTable(steps.observations, steps.actions, rows, LENGTH)
    return PreferenceDataset(table, jnp.asarray(rng.integers(0, 2, 2500), jnp.float32))


def make_windows() -> WindowDataset:
    rng, data, steps = np.random.default_rng(2), make_transitions(), np.arange(ROWS) % (EPISODE + 1)
    return WindowDataset(
        observations=data.observations,
        actions=data.actions,
        returns_to_go=jnp.asarray(rng.uniform(0, 3000, ROWS), jnp.float32),
        steps=jnp.asarray(steps, jnp.int32),
        left=jnp.asarray(EPISODE - steps, jnp.int32),
        rows=jnp.asarray(np.flatnonzero(steps[: ROWS - WINDOW] < EPISODE), jnp.int32),
        length=WINDOW,
    )


def tensor(array: Any) -> torch.Tensor:
    # A copy: PyTorch writes into its tensors, and what JAX owns is not to be written.
    return torch.from_numpy(np.array(array)).to(DEVICE)


class TorchTransitions:
    """The same data as a `TransitionDataset`."""

    def __init__(self, data: TransitionDataset) -> None:
        self.columns = [tensor(column) for column in (data.observations, data.actions, data.rewards, data.terminated)]

    def sample(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        return self.take(torch.randint(ROWS - 1, (batch_size,), device=DEVICE))

    def take(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (*(column[rows] for column in self.columns), self.columns[0][rows + 1])


class TorchPairs:
    """The same data as a `PreferenceDataset`."""

    def __init__(self, data: PreferenceDataset) -> None:
        self.observations, self.actions = tensor(data.pairs.observations), tensor(data.pairs.actions)
        self.rows, self.labels = tensor(data.pairs.rows).long(), tensor(data.labels)
        self.steps = torch.arange(LENGTH, device=DEVICE)

    def sample(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        return self.take(torch.randint(len(self.labels), (batch_size,), device=DEVICE))

    def take(self, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        steps = self.rows[indices][..., None] + self.steps
        return self.observations[steps], self.actions[steps], self.labels[indices]


class TorchWindows:
    """The same data as a `WindowDataset`."""

    def __init__(self, data: WindowDataset) -> None:
        self.columns = [
            tensor(column) for column in (data.observations, data.actions, data.returns_to_go, data.steps.astype(int))
        ]
        self.left, self.rows = tensor(data.left), tensor(data.rows).long()
        self.places = torch.arange(WINDOW, device=DEVICE)

    def sample(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        return self.take(torch.randint(len(self.rows), (batch_size,), device=DEVICE))

    def take(self, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = self.rows[indices]
        places = self.places - (WINDOW - self.left[rows]).clamp(min=0)[:, None]
        mask, steps = places >= 0, rows[:, None] + places.clamp(min=0)
        return (*(column[steps] for column in self.columns), mask)


# The peers.


def network(params: PyTree, dropout: float = 0.0) -> torch.nn.Sequential:
    """An MLP with the parameters of one of ours."""
    modules: list[torch.nn.Module] = []
    for index in range(len(params)):
        kernel, bias = params[f"Dense_{index}"]["kernel"], params[f"Dense_{index}"]["bias"]
        linear = torch.nn.Linear(*kernel.shape)
        linear.weight.data, linear.bias.data = tensor(np.array(kernel).T.copy()), tensor(bias)
        modules += [linear, torch.nn.ReLU()]
        if dropout:
            modules.append(torch.nn.Dropout(dropout))
    return torch.nn.Sequential(*modules[: modules.index(linear) + 1]).to(DEVICE)


def members(params: PyTree) -> torch.nn.ModuleList:
    """The networks of an ensemble."""
    count = jax.tree.leaves(params)[0].shape[0]
    return torch.nn.ModuleList(
        network(jax.tree.map(lambda leaf, index=index: leaf[index], params)) for index in range(count)
    )


def log_probability(actions: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    return -(actions - means).square().sum(-1)


class TorchCPL(torch.nn.Module):
    """The update of `CPLAgent`, after pretraining."""

    def __init__(self, agent: CPLAgent) -> None:
        super().__init__()
        self.config = agent.config
        self.policy = network(agent.params["MLP_0"], agent.config.dropout)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor, labels: torch.Tensor) -> Losses:
        log_probs = log_probability(actions, torch.tanh(self.policy(observations)))
        first, second = (self.config.temperature * log_probs.sum(-1)).unbind(-1)
        weight, softplus = self.config.conservative_weight, torch.nn.functional.softplus
        losses = labels * softplus(weight * first - second) + (1 - labels) * softplus(weight * second - first)
        return {"policy/loss": losses.mean()}

    def trained(self) -> dict[str, torch.nn.Module]:
        return {"policy/loss": self.policy}


class TorchRewardModel(torch.nn.Module):
    """The update of `RewardModelAgent` with MLPs."""

    def __init__(self, agent: RewardModelAgent) -> None:
        super().__init__()
        self.networks = members(agent.params["MLP_0"])

    def rewards(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        steps = torch.cat([observations, actions], -1)
        return torch.stack([each(steps)[..., 0] for each in self.networks])

    def loss(self, rewards: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scores = rewards.sum(-1)
        logits = scores[..., 1] - scores[..., 0]
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.expand_as(logits))

    def forward(self, observations: torch.Tensor, actions: torch.Tensor, labels: torch.Tensor) -> Losses:
        return {"reward/loss": self.loss(self.rewards(observations, actions), labels)}

    def trained(self) -> dict[str, torch.nn.Module]:
        return {"reward/loss": self.networks}


class TorchIQL(torch.nn.Module):
    """The update of `IQLAgent`."""

    def __init__(self, agent: IQLAgent) -> None:
        super().__init__()
        self.config = agent.config
        self.policy = network(agent.params["policy"]["MLP_0"], agent.config.dropout)
        self.value = network(agent.params["value"]["MLP_0"])
        (critics,), (targets,) = agent.params["critics"].values(), agent.target_params.values()
        self.critics, self.targets = members(critics), members(targets).requires_grad_(False)

    def forward(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        rewards: torch.Tensor,
        terminated: torch.Tensor,
        next_observations: torch.Tensor,
    ) -> Losses:
        config, steps = self.config, torch.cat([observations, actions], -1)
        with torch.no_grad():
            least = torch.min(*(each(steps)[..., 0] for each in self.targets))
            next_values = self.value(next_observations)[..., 0]
            targets = rewards + config.discount * torch.where(terminated, 0.0, next_values)
        advantages = least - self.value(observations)[..., 0]
        asymmetry = torch.where(advantages < 0, 1 - config.expectile, config.expectile)
        weights = torch.exp(advantages.detach() / config.temperature).clamp(max=config.max_weight)
        errors = -log_probability(actions, torch.tanh(self.policy(observations)))
        return {
            "value/loss": (asymmetry * advantages.square()).mean(),
            "critic/loss": sum((each(steps)[..., 0] - targets).square().mean() for each in self.critics),
            "policy/loss": (weights * errors).mean(),
        }

    def trained(self) -> dict[str, torch.nn.Module]:
        return {"value/loss": self.value, "critic/loss": self.critics, "policy/loss": self.policy}

    @torch.no_grad()
    def after(self, form: Form) -> None:
        targets, critics, rate = (
            [*self.targets.parameters()],
            [*self.critics.parameters()],
            self.config.target_update_rate,
        )
        if form != "torch":
            torch._foreach_lerp_(targets, critics, rate)
            return
        for target, critic in zip(targets, critics, strict=True):
            target.copy_(rate * critic + (1 - rate) * target)


class TorchPIQL(torch.nn.Module):
    """The update of `PIQLAgent`, while the reward model learns."""

    def __init__(self, agent: PIQLAgent) -> None:
        super().__init__()
        self.reward_model, self.iql = TorchRewardModel(agent.reward_model), TorchIQL(agent.iql)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor, labels: torch.Tensor) -> Losses:
        rewards = self.reward_model.rewards(observations, actions)
        fixed = rewards.detach().mean(0)[..., :-1]
        return {
            "reward/loss": self.reward_model.loss(rewards, labels),
            **self.iql(
                observations[..., :-1, :],
                actions[..., :-1, :],
                fixed,
                torch.zeros_like(fixed, dtype=torch.bool),
                observations[..., 1:, :],
            ),
        }

    def trained(self) -> dict[str, torch.nn.Module]:
        return {**self.reward_model.trained(), **self.iql.trained()}

    def after(self, form: Form) -> None:
        self.iql.after(form)


def linear(*parts: PyTree) -> torch.nn.Linear:
    """One layer with the parameters of some of ours, side by side; a bias of zeros where there is none."""
    kernel = np.concatenate([part["kernel"] for part in parts], axis=1)
    module = torch.nn.Linear(*kernel.shape)
    biases = [part["bias"] if "bias" in part else np.zeros(part["kernel"].shape[1], np.float32) for part in parts]
    module.weight.data, module.bias.data = tensor(kernel.T.copy()), tensor(np.concatenate(biases))
    return module.to(DEVICE)


def layer_norm(part: PyTree) -> torch.nn.LayerNorm:
    module = torch.nn.LayerNorm(len(part["scale"]), eps=1e-6)
    module.weight.data, module.bias.data = tensor(part["scale"]), tensor(part["bias"])
    return module.to(DEVICE)


class TorchBlock(torch.nn.Module):
    """Attention and a network of one hidden layer, as in GPT-2."""

    def __init__(self, params: PyTree, index: int, heads: int, dropout: float) -> None:
        super().__init__()
        attention = params[f"Attention_{index}"]
        self.heads, self.rate = heads, dropout
        self.norm, self.renorm = (layer_norm(params[f"ColumnNorm_{2 * index + place}"]) for place in range(2))
        self.project = linear(*(attention[name] for name in ("query", "key", "value")))
        self.out = linear(attention["out"])
        self.up, self.down = (linear(params[f"Dense_{2 * index + place}"]) for place in range(2))
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, read: slice) -> torch.Tensor:
        batch, _, width = hidden.shape
        projected = self.project(self.norm(hidden)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = projected.unbind()
        attended = torch.nn.functional.scaled_dot_product_attention(
            queries[:, :, read], keys, values, attn_mask=mask[:, None, read], dropout_p=self.rate
        )
        hidden = hidden[:, read] + self.dropout(self.out(attended.transpose(1, 2).reshape(batch, -1, width)))
        added: torch.Tensor = self.dropout(self.down(torch.relu(self.up(self.renorm(hidden)))))
        return hidden + added


class TorchDecisionTransformer(torch.nn.Module):
    """The update of `DecisionTransformerAgent`."""

    def __init__(self, agent: DecisionTransformerAgent) -> None:
        super().__init__()
        config, params, blocks = agent.config, agent.params, agent.params["Transformer_0"]
        self.scale, self.last, self.clip = config.return_scale, config.episode_steps - 1, config.clip
        self.step = torch.nn.Embedding.from_pretrained(tensor(params["step"]["embedding"]), freeze=False)
        self.parts = torch.nn.ModuleList(linear(params[name]) for name in ("return", "observation", "action"))
        self.norm, self.final = layer_norm(params["LayerNorm_0"]), layer_norm(blocks[f"ColumnNorm_{2 * config.layers}"])
        self.blocks = torch.nn.ModuleList(
            TorchBlock(blocks, index, config.heads, config.dropout) for index in range(config.layers)
        )
        self.head, self.dropout = linear(params["head"]), torch.nn.Dropout(config.dropout)
        self.seen = torch.ones((3 * WINDOW, 3 * WINDOW), dtype=torch.bool, device=DEVICE).tril()
        # Padding sees itself: PyTorch's attention gives NaN to a token that sees nothing.
        self.itself = torch.eye(3 * WINDOW, dtype=torch.bool, device=DEVICE)
        self.adam = functools.partial(torch.optim.AdamW, weight_decay=config.weight_decay)
        self.form: Form = "torch"
        # The keys' bias, which changes nothing, is there in PyTorch alone.
        if sum(each.numel() for each in self.parameters()) - config.layers * config.width != num_parameters(params):
            raise SystemExit("the two decision transformers differ in their number of parameters")

    def forward(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        returns_to_go: torch.Tensor,
        steps: torch.Tensor,
        mask: torch.Tensor,
    ) -> Losses:
        place = self.step(steps.clamp(max=self.last))
        inputs = (returns_to_go[..., None] / self.scale, observations, actions)
        tokens = torch.stack([part(each) + place for part, each in zip(self.parts, inputs, strict=True)], 2)
        hidden = self.dropout(self.norm(tokens.flatten(1, 2)))
        seen = self.seen & mask.repeat_interleave(3, 1)[:, None] | self.itself
        everything, states = slice(None), slice(1, None, 3)
        early = self.form != "torch"
        for block in self.blocks[:-1]:
            hidden = block(hidden, seen, everything)
        hidden = self.blocks[-1](hidden, seen, states if early else everything)
        means = torch.tanh(self.head(self.final(hidden)[:, everything if early else states]))
        errors = (means - actions).square().mean(-1)
        return {"policy/loss": (errors * mask).sum() / mask.sum()}

    def trained(self) -> dict[str, torch.nn.Module]:
        return {"policy/loss": self}


class Peer:
    """A module, its optimisers, each with the losses that it lowers, and its data."""

    def __init__(self, module: Any, data: Any, batch_size: int, form: Form) -> None:
        self.data, self.batch_size = data, batch_size
        self.losses = torch.compile(module) if form == "compiled" else module
        self.after: Callable[[Form], None] = getattr(module, "after", lambda form: None)
        module.form = self.form = form
        self.clip: float | None = getattr(module, "clip", None)
        adam = getattr(module, "adam", torch.optim.Adam)
        networks = module.trained()
        groups = [[name] for name in networks] if form == "torch" else [list(networks)]
        self.optimizers = [
            adam(
                [each for name in names for each in networks[name].parameters()],
                lr=LEARNING_RATE,
                fused=None if form == "torch" else True,
            )
            for names in groups
        ]
        self.groups = groups

    def update(self, batch: tuple[torch.Tensor, ...]) -> Losses:
        losses: Losses = self.losses(*batch)
        for names, optimizer in zip(self.groups, self.optimizers, strict=True):
            optimizer.zero_grad()
            torch.stack([losses[name] for name in names]).sum().backward()
            if self.clip is not None:
                torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.clip)
            optimizer.step()
        self.after(self.form)
        return losses

    def run(self, updates: int) -> None:
        for _ in range(updates):
            self.update(self.data.sample(self.batch_size))
        if ON_GPU:
            torch.cuda.synchronize()


# The cases.


@dataclass(frozen=True)
class Case:
    """An agent's update, in both implementations.

    Attributes:
        name: of the case.
        sizes: of networks and batch, for people.
        agent_class: ours.
        config: ours.
        module: the peer's.
        kind: of the data.
        batch_size: in pairs, transitions or windows.
        width: of the hidden layers.
        flops: of the matrix products of one update.
    """

    name: str
    sizes: str
    agent_class: type[Any]
    config: Any
    module: type[torch.nn.Module]
    kind: Kind
    batch_size: int
    width: int
    flops: float

    @functools.cached_property
    def data(self) -> Any:
        return {"pairs": make_pairs, "transitions": make_transitions, "windows": make_windows}[self.kind]()

    @property
    def example(self) -> Any:
        return self.data.take(jnp.arange(2))

    def create(self, config: Any = None) -> Any:
        return self.agent_class.create(config or self.config, self.example, jax.random.key(0))

    def create_peer(self, agent: Any, form: Form) -> Peer:
        peers: dict[Kind, Any] = {"pairs": TorchPairs, "transitions": TorchTransitions, "windows": TorchWindows}
        return Peer(self.module(agent), peers[self.kind](self.data), self.batch_size, form)

    @property
    def samples(self) -> int:
        """What a network sees in a batch: steps, or tokens."""
        return self.batch_size * {"pairs": 2 * LENGTH, "transitions": 1, "windows": 3 * WINDOW}[self.kind]


def forward_flops(rows: int, inputs: int, hidden: tuple[int, ...], outputs: int) -> float:
    widths = [inputs, *hidden, outputs]
    return 2.0 * rows * sum(before * after for before, after in itertools.pairwise(widths))


def iql_flops(rows: int, hidden: tuple[int, ...]) -> float:
    """Policy, value and two critics trained; the value of the next state and the two target critics not."""
    policy = forward_flops(rows, OBSERVATIONS, hidden, ACTIONS)
    value, critic = (forward_flops(rows, inputs, hidden, 1) for inputs in (OBSERVATIONS, OBSERVATIONS + ACTIONS))
    return 3 * policy + (3 + 1) * value + 2 * (3 + 1) * critic


def cpl_case(name: str, pairs: int, hidden: tuple[int, ...], dropout: float = 0.0) -> Case:
    config = CPLConfig(
        hidden_dims=hidden, dropout=dropout, pretrain_updates=0, warmup_updates=0, learning_rate=LEARNING_RATE
    )
    sizes = f"{pairs} pairs x {LENGTH}, {hidden[0]} x {len(hidden)}" + (f", dropout {dropout}" if dropout else "")
    flops = 3 * forward_flops(2 * pairs * LENGTH, OBSERVATIONS, hidden, ACTIONS)
    return Case(name, sizes, CPLAgent, config, TorchCPL, "pairs", pairs, hidden[0], flops)


def reward_case(name: str, ensemble: int) -> Case:
    pairs, hidden = 32, (256, 256)
    config = RewardModelConfig(hidden_dims=hidden, ensemble=ensemble, learning_rate=LEARNING_RATE)
    flops = 3 * ensemble * forward_flops(2 * pairs * LENGTH, OBSERVATIONS + ACTIONS, hidden, 1)
    sizes = f"{pairs} pairs x {LENGTH}, {hidden[0]} x {len(hidden)}, {ensemble} member{'s' * (ensemble > 1)}"
    return Case(name, sizes, RewardModelAgent, config, TorchRewardModel, "pairs", pairs, hidden[0], flops)


def iql_case() -> Case:
    batch_size, hidden = 256, (256, 256)
    config = IQLConfig(hidden_dims=hidden, learning_rate=LEARNING_RATE)
    sizes = f"{batch_size} transitions, {hidden[0]} x {len(hidden)}"
    return Case(
        "iql", sizes, IQLAgent, config, TorchIQL, "transitions", batch_size, hidden[0], iql_flops(batch_size, hidden)
    )


def piql_case(name: str, pairs: int, hidden: tuple[int, ...]) -> Case:
    config = PIQLConfig(
        reward=RewardModelConfig(hidden_dims=hidden, ensemble=1, learning_rate=LEARNING_RATE),
        iql=IQLConfig(hidden_dims=hidden, learning_rate=LEARNING_RATE),
    )
    rows = 2 * pairs * LENGTH
    reward = 3 * forward_flops(rows, OBSERVATIONS + ACTIONS, hidden, 1)
    flops = reward + iql_flops(rows - 2 * pairs, hidden)
    sizes = f"{pairs} pairs x {LENGTH}, {hidden[0]} x {len(hidden)}"
    return Case(name, sizes, PIQLAgent, config, TorchPIQL, "pairs", pairs, hidden[0], flops)


def decision_case(name: str, batch_size: int, width: int, layers: int) -> Case:
    """The last block is needed at the observations' tokens alone, but for its keys and values."""
    config = DecisionTransformerConfig(
        length=WINDOW, width=width, layers=layers, warmup_updates=0, learning_rate=LEARNING_RATE
    )
    tokens = 3 * WINDOW * batch_size
    keys = forward_flops(tokens, width, (), 2 * width)
    others = forward_flops(tokens, width, (), 2 * width) + forward_flops(tokens, width, (4 * width,), width)
    attention = 2 * forward_flops(tokens, width, (), 3 * WINDOW)
    flops = 3 * ((layers - 1) * (keys + others + attention) + keys + (others + attention) / 3)
    sizes = f"{batch_size} windows x {WINDOW}, {width} x {layers}, dropout {config.dropout}"
    return Case(
        name,
        sizes,
        DecisionTransformerAgent,
        config,
        TorchDecisionTransformer,
        "windows",
        batch_size,
        width,
        flops,
    )


CASES = {
    case.name: case
    for case in (
        iql_case(),
        cpl_case("cpl", 96, (512, 512)),
        cpl_case("cpl-dropout", 96, (512, 512), dropout=0.25),
        cpl_case("cpl-small", 32, (256, 256)),
        reward_case("reward-1", 1),
        reward_case("reward-3", 3),
        piql_case("piql", 96, (512, 512)),
        piql_case("piql-small", 32, (256, 256)),
        decision_case("decision", 64, 128, 3),
        decision_case("decision-small", 32, 64, 1),
    )
}


# What is measured.


def check_same_losses(case: Case, form: Form, updates: int = 4) -> None:
    """Makes the same updates with ours and a peer, without dropout, and stops the program where their losses differ."""
    config = case.config
    if getattr(config, "dropout", 0.0):
        config = type(config)(**{**vars(config), "dropout": 0.0})
    agent = case.create(config)
    peer = case.create_peer(agent, form)
    update = jax.jit(lambda agent, batch: agent.update(batch, jax.random.key(0)))
    # A GPU multiplies in TF32, with some three digits.
    tolerance = 2e-2 if ON_GPU else 1e-3
    for step in range(updates):
        indices = np.random.default_rng(step).integers(0, 2000, case.batch_size)
        agent, ours = update(agent, case.data.take(jnp.asarray(indices)))
        for name, loss in peer.update(peer.data.take(tensor(indices))).items():
            if not np.isclose(loss.item(), ours[name].item(), rtol=tolerance, atol=1e-6):
                raise SystemExit(
                    f"{case.name}: {name} at update {step} is {ours[name].item():.6g} here and {loss.item():.6g} in"
                    " PyTorch: the two do not compute the same, and their speeds must not be compared."
                )


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def our_run(agent: Any, case: Case, updates: int, seeds: int = 0) -> Callable[[], Any]:
    key = jax.random.split(jax.random.key(1), seeds) if seeds else jax.random.key(1)
    return lambda: jax.block_until_ready(
        update_many(agent, case.data, key, num_updates=updates, batch_size=case.batch_size)
    )


def updates_per_window(case: Case, window: float) -> int:
    """Such that a window takes about so many seconds, at a rate of matrix products that is usual."""
    return int(np.clip(window * (5e12 if ON_GPU else 6e10) / case.flops, 2, 10_000))


def compare(case: Case, windows: int, window: float, forms: Sequence[Form]) -> dict[str, Any]:
    """Updates per second of ours and of the peers, and FLOP/s of bare products, in turn."""
    for form in forms:
        check_same_losses(case, form)
    agent, updates = case.create(), updates_per_window(case, window)
    products, product_flops = product_run(case, window)
    peers = {form: functools.partial(case.create_peer(agent, form).run, updates) for form in forms}
    runs = {"ours": our_run(agent, case, updates), **peers, "products": products}
    for run in runs.values():
        run()
    turns = [{name: seconds(run) for name, run in runs.items()} for _ in range(windows)]
    times = {name: np.array([turn[name] for turn in turns]) for name in runs}
    row: dict[str, Any] = {"case": case.name, "sizes": case.sizes, "flops": case.flops, "updates": updates}
    for name in runs.keys() - {"products"}:
        row[name] = updates / float(np.median(times[name]))
        ratios = times[name] / times["ours"]
        row[f"{name}_ratio"] = [float(value) for value in (np.median(ratios), ratios.min(), ratios.max())]
    rates = product_flops / times["products"]
    row["products"] = float(np.median(rates))
    row["share"] = float(np.median(updates * case.flops / times["ours"] / rates))
    return row


def compare_seeds(case: Case, windows: int, window: float) -> dict[str, Any]:
    """Eight seeds as one program, against one."""
    updates = max(2, updates_per_window(case, window) // SEEDS)
    keys = jax.random.split(jax.random.key(0), SEEDS)
    runs = [
        our_run(case.create(), case, updates),
        our_run(create_seeds(case.agent_class, case.config, case.example, keys), case, updates, SEEDS),
    ]
    for run in runs:
        run()
    ratios = [one / eight for eight, one in ((seconds(runs[1]), seconds(runs[0])) for _ in range(windows))]
    return {"case": case.name, "seeds": SEEDS, "times_of_one": 1 / float(np.median(ratios))}


def product_run(case: Case, window: float) -> tuple[Callable[[], Any], float]:
    """Products [rows, width] x [width, width], one after the other, and their FLOPs."""
    rows = case.samples
    matrix = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(case.width, case.width)))[0], jnp.float32)
    flops = forward_flops(rows, case.width, (), case.width)
    count = max(2, round(updates_per_window(case, window) * case.flops / flops))

    @jax.jit
    def chain(inputs: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda hidden, _: (hidden @ matrix, None), inputs, length=count)[0]

    inputs = jnp.ones((rows, case.width), jnp.float32)
    return lambda: jax.block_until_ready(chain(inputs)), count * flops


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--windows", type=int, default=7, help="of each implementation (7)")
    parser.add_argument("--seconds", type=float, default=2.0, help="that a window is to take, about (2)")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too, which takes its time")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    windows, window = arguments.windows, arguments.seconds
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    if ON_GPU:
        if not torch.cuda.is_available():
            raise SystemExit("JAX has a GPU here and this PyTorch has none; install one with CUDA to compare.")
        # What JAX does unless told otherwise.
        torch.set_float32_matmul_precision("high")
    device = jax.devices()[0].device_kind if ON_GPU else f"{cores} cores"
    versions = {"jax": jax.__version__, "torch": torch.__version__, "python": platform.python_version()}
    print(f"{device}; " + ", ".join(f"{name} {version}" for name, version in versions.items()))

    forms: list[Form] = ["torch", "fused", "compiled"] if arguments.compile else ["torch", "fused"]
    header = "".join(f"{name:>10}{'ratio':>7}{'(from, to)':>14}" for name in forms)
    print(f"\n{'updates per second':<54}{'robopref':>10}{header}{'of products':>24}")
    rows = []
    for name in arguments.cases:
        row = compare(CASES[name], windows, window, forms)
        cells = ""
        for form in forms:
            middle, low, high = row[f"{form}_ratio"]
            cells += f"{row[form]:>10,.1f}{middle:>7.2f}{f'({low:.2f}, {high:.2f})':>14}"
        cells += f"{row['share']:>11.0%} of {row['products'] / 1e9:,.0f} GFLOP/s"
        print(f"{name:<14}{row['sizes']:<40}{row['ours']:>10,.1f}{cells}", flush=True)
        rows.append(row)

    print("\neight seeds as one program, in times of one seed")
    seeds = []
    for name in arguments.cases:
        seeds.append(compare_seeds(CASES[name], windows, window))
        print(f"{name:<14}{seeds[-1]['times_of_one']:>6.2f}", flush=True)

    million = [1e6 / row["ours"] for row in rows if row["case"] == "iql"]
    if million:
        print(f"\na million IQL updates take {million[0]:,.0f} s at this rate")
    if arguments.json:
        report = {"device": device, "versions": versions, "rows": rows, "seeds": seeds}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
