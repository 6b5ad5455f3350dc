"""The training code trains on the protocol that engines run. Needs torch and transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polydraft_builtin_pairs as builtin
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from training.architectures import SHAPES, build_drafter, build_target  # noqa: E402
from training.centroids import balanced_clusters, install, recall  # noqa: E402
from training.checkpoint import load  # noqa: E402
from training.conditional import conditional_copy  # noqa: E402
from training.corpus import load_tokenizer  # noqa: E402
from training.drafters import ask_target, draft_step  # noqa: E402
from training.experts import use_dense_experts  # noqa: E402
from training.fused import use_fused_norms  # noqa: E402
from training.prompts import prompt_ids  # noqa: E402
from training.protocol import ModelDrafter, MtpDrafter, Runner, decode  # noqa: E402
from training.tokenizer import BOS, IDS, VOCAB_SIZE, ChatTemplate  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

QUESTION: dict[str, Any] = {"role": "user", "content": "hi"}


def prompt() -> list[int]:
    tokenizer = load_tokenizer(builtin.path("tiny-e2b"))
    return prompt_ids(tokenizer, {"kind": "text", "text": builtin.prompts()[2].text})


@pytest.mark.parametrize("name", SHAPES)
def test_training_runs_the_protocol(name: str) -> None:
    """The batch of all rounds gives the same as one round at a time through the drafter's own forward."""
    torch.manual_seed(0)
    target, drafter = build_target(name).train(False), build_drafter(name).train(False)
    for weight in (*target.parameters(), *drafter.parameters()):
        if weight.ndim > 1:
            weight.data.mul_(3)
    rows = torch.randint(len(IDS), VOCAB_SIZE, (1, 150))
    position, ids = 120, rows[0].tolist()
    with torch.no_grad():
        reference = target(input_ids=rows, use_cache=False).logits
        use_dense_experts(target)
        use_fused_norms(target)
        rounds = ask_target(target, rows)
        torch.testing.assert_close(rounds.wanted, reference.softmax(-1), atol=1e-5, rtol=1e-3)
        output = Runner(target).run(ids[:position])
        one = output.last_hidden_state[:, -1:]
        many = rounds.hidden[:, : rounds.count]
        for step in range(3):
            _, many = draft_step(drafter, rounds, step, many)
            embed = target.model.embed_tokens(torch.tensor([[ids[position + step]]]))
            one = drafter(
                inputs_embeds=torch.cat([embed, one], -1),
                position_ids=torch.tensor([[position]]),
                shared_kv_states=dict(output.shared_kv_states),
            ).last_hidden_state
            torch.testing.assert_close(many[:, position - 1], one[:, 0], atol=1e-4, rtol=1e-3)


def test_clusters_are_balanced_and_found() -> None:
    torch.manual_seed(0)
    assigned = balanced_clusters(torch.randn(256, 8), 16, rounds=3)
    assert torch.bincount(assigned).tolist() == [16] * 16
    drafter: Any = build_drafter("tiny-e2b")
    install(drafter)
    assert sorted(drafter.masked_embedding.token_ordering.tolist()) == list(range(VOCAB_SIZE))
    assert recall(drafter, drafter.lm_head.weight[None, :64]) > 0.5


@pytest.mark.parametrize("name", builtin.pairs())
def test_speculation_keeps_the_output_and_accepts(name: str) -> None:
    target, model = load(builtin.path(name)), load(builtin.path(builtin.pairs()[name]))
    drafter = ModelDrafter(model) if name == "tiny-llama" else MtpDrafter(model)
    plain = decode(target, None, prompt(), new_tokens=48, k=0)
    fast = decode(target, drafter, prompt(), new_tokens=48, k=4)
    assert fast.tokens == plain.tokens
    assert fast.accepted > 0
    assert fast.rounds < plain.rounds


def test_one_target_drafts_for_another() -> None:
    target = load(builtin.path("tiny-31b"))
    plain = decode(target, None, prompt(), new_tokens=32, k=0)
    itself = decode(target, ModelDrafter(target), prompt(), new_tokens=32, k=4)
    other = decode(target, ModelDrafter(load(builtin.path("tiny-llama"))), prompt(), new_tokens=32, k=4)
    assert plain.tokens == itself.tokens == other.tokens
    assert itself.accepted >= 0.95 * itself.drafted


def test_conditional_copy_has_the_same_logits(tmp_path: Path) -> None:
    from transformers import Gemma4ForConditionalGeneration

    copy = conditional_copy(builtin.path("tiny-31b"), tmp_path / "copy")
    ids = torch.tensor([prompt()])
    model: Any = Gemma4ForConditionalGeneration.from_pretrained(copy, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, load(builtin.path("tiny-31b"))(input_ids=ids).logits)


def test_chat_template_is_gemmas() -> None:
    render = ChatTemplate()
    assert render([QUESTION]) == "<bos><|turn>user\nhi<turn|>\n<|turn>model\n"
    system = {"role": "system", "content": "S"}
    assert render([system, QUESTION], enable_thinking=True).startswith("<bos><|turn>system\n<|think|>\nS<turn|>\n")
    answered = [QUESTION, {"role": "assistant", "content": "<|channel>thought\nx\n<channel|>yo"}, QUESTION]
    assert "<|turn>model\nyo<turn|>\n" in render(answered)
    tool = {
        "type": "function",
        "function": {
            "name": "f",
            "description": "D",
            "parameters": {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]},
        },
    }
    arguments = {"b": [True, None, 1], "a": "x"}
    called: list[dict[str, Any]] = [
        QUESTION,
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        },
        {"role": "tool", "name": "f", "content": "y"},
    ]
    assert render(called, tools=[tool]) == (
        '<bos><|turn>system\n<|tool>declaration:f{description:<|"|>D<|"|>,parameters:{properties:{type:{type:<|"|>STRING'
        '<|"|>}},required:[<|"|>type<|"|>],type:<|"|>OBJECT<|"|>}}<tool|><turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n'
        '<|tool_call>call:f{a:<|"|>x<|"|>,b:[true,null,1]}<tool_call|><|tool_response>response:f{value:<|"|>y<|"|>}'
        "<tool_response|>"
    )


def test_tokenizer_keeps_every_text() -> None:
    from transformers import AutoTokenizer

    for name in ("tiny-e2b", "tiny-31b-assistant", "tiny-llama"):
        tokenizer: Any = AutoTokenizer.from_pretrained(builtin.path(name))
        for text in ("def f(x):\n        return  x  # é 漢字 🙂 , 's\n", "\t\r\n  a", ""):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        ids = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, return_dict=False)
        assert ids.count(BOS) == 1
        assert ids == prompt_ids(load_tokenizer(builtin.path(name)), {"kind": "chat", "messages": [QUESTION]})
