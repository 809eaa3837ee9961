"""Rendering: each form's text, the guess, and each fault with its row and column."""

import pytest

from ftjax.data.template import Rendered, guess, reference, renderer
from ftjax.errors import FtjaxError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": None}]


@pytest.mark.parametrize(
    "row, form, rendered",
    [
        ({"text": "t"}, "text", Rendered("", "t")),
        ({"prompt": "p", "completion": "c", "n": 1}, "prompt", Rendered("p", "c")),
        ({"prompt": "p", "response": "c"}, "prompt", Rendered("p", "c")),
        (
            {"instruction": "do {it}", "input": "", "output": "o"},
            "instruction",
            Rendered(
                "Below is an instruction that describes a task. Write a response that appropriately completes the "
                "request.\n\n### Instruction:\ndo {it}\n\n### Response:",
                "o",
            ),
        ),
        (
            {"instruction": "do", "input": "x", "output": "o"},
            "instruction",
            Rendered(
                "Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n"
                "### Instruction:\ndo\n\n### Input:\nx\n\n### Response:",
                "o",
            ),
        ),
        ({"messages": CHAT}, "messages", Rendered(messages=(CHAT[0], {"role": "assistant", "content": "a"}))),
    ],
)
def test_forms_by_their_columns(row, form, rendered):
    assert guess(row.keys()) == form
    assert renderer(form)(row, "row 1") == rendered


def test_templates_over_any_columns():
    prompt, completion = "{{Words}}: {src}\n", " {the target} {n}"
    assert guess(["text"], prompt, completion) == "template"
    row = {"src": "a {b}", "the target": "c", "n": 3}
    assert renderer("template", prompt, completion)(row, "row 1") == Rendered("{Words}: a {b}\n", " c 3")


def test_reference_is_the_answer():
    assert reference(Rendered("p", " c\n")) == "c"
    assert reference(Rendered(messages=tuple(CHAT))) == "a"


def test_dolly_and_seed_tasks(shared):
    from ftjax.data.read import read

    dolly = read(str(shared / "data/instruct/dolly_hhrlhf_train_small.jsonl"))
    render = renderer(guess(dolly.column_names))
    assert [render(row, "") for row in dolly] == [Rendered(row["prompt"], row["response"]) for row in dolly]


@pytest.mark.parametrize("template", ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{a", "a}", "{a.__class__}"])
def test_templates_hold_plain_columns_only(template):
    with pytest.raises(FtjaxError, match="data.completion: "):
        renderer("template", "", template)


@pytest.mark.parametrize(
    "form, row, message",
    [
        (
            "text",
            {"txt": "x"},
            r"""f.csv row 3: column 'text' does not exist \(did you mean "txt"\?\); the row has: txt""",
        ),
        ("text", {"text": None, "b": 1}, r"f.csv row 3: column 'text' is null or absent; the row has: b"),
        ("text", {"text": ["x"]}, r"f.csv row 3: column 'text' should be text, found list"),
        ("text", {"text": " \n"}, r"f.csv row 3: the answer is empty"),
        ("prompt", {"prompt": "p", "completion": ""}, r"f.csv row 3: the answer is empty"),
        ("prompt", {"prompt": "p"}, r"f.csv row 3: column 'completion' does not exist"),
        ("messages", {"messages": "x"}, r"f.csv row 3: `messages` should be a list"),
        ("messages", {"messages": [{"content": "x"}]}, r"f.csv row 3: message 1 should be an object with `role`"),
        ("messages", {"messages": [{"role": "user", "content": 3}]}, r"row 3: message 1: `content` should be text"),
        ("messages", {"messages": CHAT[:1]}, r"f.csv row 3: no assistant message with any text"),
    ],
)
def test_bad_rows(form, row, message):
    with pytest.raises(FtjaxError, match=message):
        renderer(form)(row, "f.csv row 3")


def test_bad_settings():
    with pytest.raises(FtjaxError, match="no known form fits the columns question, answer"):
        guess(["question", "answer"])
    with pytest.raises(FtjaxError, match=r'unknown form \'promt\' \(did you mean "prompt"\?\)'):
        renderer("promt")
    with pytest.raises(FtjaxError, match="data.completion is empty"):
        renderer("template", "{a}", "")
    with pytest.raises(FtjaxError, match="names no {column}"):
        renderer("template", "{a}", "yes")
    with pytest.raises(FtjaxError, match="row 1: the answer is empty"):
        renderer("template", "{a}", "\n{b}")({"a": "x", "b": ""}, "row 1")
