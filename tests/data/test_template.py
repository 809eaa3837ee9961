"""Rendering: each form's text, the guess, and each fault with its row and column."""

import json

import datasets
import pytest

from ftjax.data.read import read_table
from ftjax.data.template import FORMS, Rendered, asked, guess, question, reference, renderer
from ftjax.errors import FtjaxError


def said(*contents):
    """Turns of user and assistant."""
    return tuple({"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(contents))


SYSTEM = ({"role": "system", "content": "s"},)
SHAREGPT = [
    {"from": "system", "value": "s"},
    {"from": "human", "value": "q"},
    {"from": "gpt", "value": "a"},
    {"from": "user", "value": "q2"},
    {"from": "bot", "value": "a2"},
]
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": None}]
EMPTY = {"role": "assistant", "content": ""}


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
        ({"conversations": SHAREGPT}, "sharegpt", Rendered(messages=(*SYSTEM, *said("q", "a", "q2", "a2")))),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preference", Rendered("p", "c")),
        (
            {"instruction": "do", "instances": [{"input": "x", "output": "o"}]},
            "instruction",
            renderer("instruction")({"instruction": "do", "input": "x", "output": "o"}, ""),
        ),
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


def test_reference_is_the_answer_and_question_what_comes_before():
    assert (question(Rendered("p ", " c\n")), reference(Rendered("p", " c\n"))) == ("p", "c")
    chat = Rendered(messages=SYSTEM + said("q", "a", "q2", "a2", "q3"))
    assert (question(chat), reference(chat)) == ("s\nq\na\nq2", "a2")


@pytest.mark.parametrize(
    "columns, form",
    [
        (["id", "messages", "text"], "messages"),
        (["conversations", "system", "tools"], "sharegpt"),
        (["conversations", "chosen", "rejected"], "preference"),
        (["prompt", "messages", "chosen", "rejected"], "preference"),
        (["prompt", "response", "text"], "prompt"),
        (["prompt", "rejected", "completion"], "prompt"),
        (["id", "instruction", "instances"], "instruction"),
    ],
)
def test_guesses(columns, form):
    assert guess(columns) == form
    assert form in FORMS


@pytest.mark.parametrize(
    "row, answer",
    [
        ({"prompt": "q", "chosen": [{"role": "assistant", "content": "a"}]}, said("q", "a")),
        ({"prompt": "q", "chosen": list(said("q", "a"))}, said("q", "a")),
        ({"prompt": list(said("q")), "chosen": list(said("q", "a"))[1:]}, said("q", "a")),
        ({"prompt": list(said("q")), "chosen": "a"}, said("q", "a")),
        ({"chosen": list(said("q", "a"))}, said("q", "a")),
        ({"conversations": SHAREGPT[:4], "chosen": SHAREGPT[4]}, SYSTEM + said("q", "a", "q2", "a2")),
        ({"conversations": SHAREGPT[:4], "chosen": "a2"}, SYSTEM + said("q", "a", "q2", "a2")),
        ({"messages": list(said("q")), "chosen": "a"}, said("q", "a")),
    ],
)
def test_preference_rows_give_the_chosen_answer(row, answer):
    assert renderer("preference")(row | {"rejected": "r"}, "row 1") == Rendered(messages=answer)


@pytest.mark.parametrize(
    "form, row, messages",
    [
        ("prompt", {"prompt": "p", "completion": " c"}, said("p", " c")),
        ("instruction", {"instruction": "i", "input": None, "output": "o"}, said("i", "o")),
        ("instruction", {"instruction": "i", "input": "x", "output": "o"}, said("i\n\nx", "o")),
        ("preference", {"prompt": "p", "chosen": "c"}, said("p", "c")),
        ("sharegpt", {"conversations": SHAREGPT[1:3]}, said("q", "a")),
        ("template", {"a": "p", "b": "c"}, said("p!", "c")),
    ],
)
@pytest.mark.parametrize("template", ["chatml", "tokenizer"])
def test_with_a_template_every_row_is_a_conversation(form, row, messages, template):
    for system, before in (("", ()), ("s", SYSTEM)):
        render = renderer(form, "{a}!", "{b}", template, system)
        assert render(row, "row 1") == Rendered(messages=before + messages, template=template)


def test_alpacas_template_keeps_the_heading_of_the_input():
    render = renderer("instruction", template="alpaca")
    row = {"instruction": "i", "input": "x", "output": "o"}
    assert render(row, "row 1").messages == said("i\n\n### Input:\nx", "o")


@pytest.mark.parametrize("template", ["", "chatml"])
def test_system_text_of_the_message_then_the_row_then_the_config(template):
    render = renderer("messages", template=template, system="s")
    assert render({"messages": list(said("q", "a"))}, "row 1").messages == SYSTEM + said("q", "a")
    for own in (None, ""):
        assert render({"messages": list(said("q", "a")), "system": own}, "row 1").messages[0]["content"] == "s"
    assert render({"messages": list(said("q", "a")), "system": "t"}, "row 1").messages[0]["content"] == "t"
    for role in ("system", "developer"):
        first = {"role": role, "content": "t"}
        for own in (None, "t"):
            assert render({"messages": [first, *said("q", "a")], "system": own}, "row 1").messages[0] == first
        with pytest.raises(FtjaxError, match="row 1: the column `system` and the first message are two different"):
            render({"messages": [first, *said("q", "a")], "system": "u"}, "row 1")


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}


@pytest.mark.parametrize(
    "calls",
    [
        [CALL | {"id": None}],
        [{"name": "f", "arguments": {"x": 1}}],
        [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
    ],
)
def test_tool_calls_as_sets_have_them(calls):
    asked, result = said("q")[0], {"role": "tool", "content": "1", "name": "f"}
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    rendered = renderer("messages")({"messages": [asked, answer, result, said("", "a")[1]]}, "row 1")
    assert rendered.messages == (
        asked,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        result,
        {"role": "assistant", "content": "a"},
    )


def turns_with(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    return [said("q")[0], {"role": "assistant", "content": "", "tool_calls": [call]}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_null_that_was_written_is_an_argument_and_one_that_a_file_fills_in_is_none(tmp_path, suffix):
    schema = {"type": "object", "properties": {"z": {"default": None, "enum": ["a", None]}}}
    rows = [
        {"messages": turns_with({"x": 1, "y": None}), "tools": [{"name": "f", "parameters": schema}]},
        {"messages": turns_with({"z": "a"}), "tools": [{"name": "f", "parameters": {"type": "object"}}]},
        {"messages": turns_with('{"x": null}'), "tools": json.dumps([{"name": "f", "parameters": schema}])},
    ]
    if suffix == ".parquet":  # its columns hold one kind of cell
        rows = rows[:2]
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    else:
        text = "".join(map("{}\n".format, map(json.dumps, rows))) if suffix == ".jsonl" else json.dumps(rows)
        (tmp_path / f"rows{suffix}").write_text(text)
    found = [renderer("messages")(row, "row 1") for row in read_table(str(tmp_path / f"rows{suffix}"))]
    arguments = [r.messages[1]["tool_calls"][0]["function"]["arguments"] for r in found]
    parameters = [r.tools[0]["function"]["parameters"] for r in found]
    if suffix == ".parquet":  # nobody can tell which of the nulls were written
        assert arguments == [{"x": 1}, {"z": "a"}]
        filled = {"type": "object", "properties": {"z": {"enum": ["a", None]}}}
        assert parameters == [filled, {"type": "object"}]
    else:
        assert arguments == [{"x": 1, "y": None}, {"z": "a"}, {"x": None}]
        assert parameters == [schema, {"type": "object"}, schema]


def turn(role, content, **more):
    return {"role": role, "content": content} | more


@pytest.mark.parametrize(
    "row, messages",
    [
        ({"prompt": [turn("user", "q")], "completion": [turn("assistant", "a")]}, said("q", "a")),
        ({"prompt": [turn("user", "q")], "completion": "a"}, said("q", "a")),
        (
            {"prompt": [*said("q", "a", "r")], "response": [turn("assistant", "b")]},
            (turn("user", "q"), turn("assistant", "a", train=False), *said("r", "b")),
        ),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a: Human\n\nHuman: r\nr\n\nAssistant: b", "rejected": "x"},
            (turn("user", "q"), turn("assistant", "a: Human", train=False), *said("r\nr", "b")),
        ),
        ({"chosen": "Human: q\n\nAssistant: b", "rejected": "x", "prompt": None}, said("q", "b")),
        # UltraFeedback: `messages` are those of the chosen side, so that they do not begin the rejected one.
        (
            {"prompt": "q", "messages": list(said("q", "a")), "chosen": list(said("q", "b")), "rejected": []},
            said("q", "b"),
        ),
    ],
)
def test_conversations_of_which_the_last_answer_is_trained(row, messages):
    """TRL's conversational prompts with completions, and Anthropic's HH-RLHF."""
    assert renderer(guess(row))(row, "row 1").messages == messages


@pytest.mark.parametrize("chosen", ["\n\nAssistant: a", "\n\nHuman: q", "a", "\n\nHuman: q\n\nAssistant: "])
def test_chosen_texts_that_are_no_whole_conversation(chosen):
    with pytest.raises(FtjaxError, match="row 1: (column 'chosen' has no prompt|column 'prompt'|the answer is empty)"):
        renderer("preference")({"chosen": chosen, "rejected": "b"}, "row 1")


def test_questions_and_answers():
    row = {"question": "2 + 2?", "answer": "4"}
    assert guess(row) == "question"
    assert renderer("question")(row, "row 1") == Rendered("Question: 2 + 2?\nAnswer:", " 4")
    assert renderer("question", template="chatml")(row, "row 1").messages == said("2 + 2?", "4")
    with pytest.raises(FtjaxError, match="row 1: the answer is empty"):
        renderer("question")(row | {"answer": " "}, "row 1")


def test_content_in_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}]
    row = {"messages": [turn("user", parts), turn("assistant", ["c"])]}
    assert renderer("messages")(row, "row 1").messages == said("ab", "c")
    for part, told in (({"type": "image", "text": None}, "image"), ({"type": "text"}, "a part without text")):
        with pytest.raises(FtjaxError, match=f"row 1: message 1: `content` contains {told}; only text is supported"):
            renderer("messages")({"messages": [turn("user", [part]), *said("", "a")[1:]]}, "row 1")


def test_a_row_with_an_image_is_refused():
    row = {"messages": list(said("What is in the picture?", "A cat.")), "images": ["cat.png"]}
    with pytest.raises(FtjaxError, match="row 1: column 'images' holds an image, and only text can be trained"):
        renderer("messages")(row, "row 1")
    with pytest.raises(FtjaxError, match="column 'image' holds an image"):
        asked({"prompt": "What is it?", "image": {"bytes": "x"}}, "row 1")
    assert renderer("messages")(row | {"images": []}, "row 1").messages == said("What is in the picture?", "A cat.")
    chosen = renderer("template", "{question}", "{answer}")({"question": "a", "answer": "b", "image": "c.png"}, "row 1")
    assert chosen == Rendered("a", "b")


@pytest.mark.parametrize("none", ["", " ", None, {}, "{}"])
def test_a_call_without_arguments(none):
    rendered = renderer("messages")({"messages": turns_with(none)}, "row 1")
    assert rendered.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL | {"strict": None}],
        [TOOL["function"]],
        json.dumps([TOOL]),
        [json.dumps(TOOL["function"])],
        json.dumps(TOOL["function"]),
    ],
)
def test_tools_of_a_row(tools):
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ]
    turns += [{"from": "observation", "value": "1"}, {"from": "gpt", "value": "a"}]
    rendered = renderer("sharegpt")({"conversations": turns, "tools": tools}, "row 1")
    assert rendered.tools == (TOOL,)
    assert [m["role"] for m in rendered.messages] == ["user", "assistant", "tool", "assistant"]
    assert rendered.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    for none in (None, "", []):
        assert renderer("sharegpt")({"conversations": turns, "tools": none}, "row 1").tools == ()


def test_turns_marked_as_not_trained():
    messages = [
        m | mark
        for m, mark in zip(
            said("q", "a", "q", "b", "q", "c"),
            [{}, {"train": False}, {}, {"weight": 0}, {"train": None}, {"weight": 1}],
        )
    ]
    rendered = renderer("messages")({"messages": messages}, "row 1")
    assert [m.get("train") for m in rendered.messages] == [None, False, None, False, None, None]
    assert all("weight" not in m for m in rendered.messages)


def test_thinking_of_its_own_field_becomes_text_for_named_templates():
    row = {"messages": [*said("q"), {"role": "assistant", "content": "a", "reasoning_content": "\nhm\n"}]}
    assert renderer("messages", template="phi")(row, "row 1").messages == said("q", "<think>\nhm\n</think>\n\na")
    assert renderer("messages", template="tokenizer")(row, "row 1").messages[1]["reasoning_content"] == "\nhm\n"


def real(shared, name):
    """(rows as their lines hold them, rows as the reader gives them, form)."""
    path = shared / "data" / name
    text = path.read_text(encoding="utf-8")
    lines = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    table = read_table(str(path))
    return lines, list(table), guess(table.columns)


def test_dolly(shared):
    lines, rows, form = real(shared, "instruct/dolly_hhrlhf_train_small.jsonl")
    assert [renderer(form)(row, "") for row in rows] == [Rendered(line["prompt"], line["response"]) for line in lines]


def test_seed_tasks(shared):
    lines, rows, form = real(shared, "instruct/seed_tasks.jsonl")
    for line, row in zip(lines, rows, strict=True):
        user, answer = renderer(form, template="chatml")(row, "").messages
        (task,) = line["instances"]
        assert user["content"] == "\n\n".join(filter(None, (line["instruction"], task["input"])))
        assert answer["content"] == task["output"]


def test_preference_pairs_of_llama_factory(shared):
    lines, rows, form = real(shared, "preference/dpo_en_demo.json")
    assert form == "preference"
    names = {"human": "user", "gpt": "assistant", "system": "system"}
    for line, row in zip(lines, rows, strict=True):
        turns = [*line["conversations"], line["chosen"]]
        expected = tuple({"role": names[t["from"]], "content": t["value"]} for t in turns)
        assert renderer(form)(row, "").messages == expected


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
        ("messages", {"messages": CHAT[:1]}, r"f.csv row 3: no assistant message has text"),
        (
            "messages",
            {"messages": [{"role": "user", "content": "Who?"}, {"role": "model", "content": "Lily."}]},
            r"f.csv row 3: no assistant message has text .* the role 'assistant' \(the row has 'user', 'model'\)",
        ),
        ("messages", {"messages": [*CHAT, CHAT[0], EMPTY]}, r"f.csv row 3: message 4 is an empty answer"),
        ("messages", {"messages": [CHAT[0], EMPTY, *CHAT]}, r"f.csv row 3: message 2 is an empty answer"),
        ("messages", {"messages": [CHAT[0] | {"train": "no"}]}, r"row 3: message 1: `train` should be true or false"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, r"message 1: `content` should be text, found"),
        ("messages", {"messages": CHAT, "tools": "["}, r"f.csv row 3: `tools`: invalid JSON: Expecting"),
        (
            "messages",
            {"messages": CHAT, "tools": "[" * 100_000},
            "f.csv row 3: `tools`: invalid JSON: nested too deeply",
        ),
        ("messages", {"messages": CHAT, "tools": [3]}, r"f.csv row 3: `tools` should be a list of JSON schemas"),
        (
            "messages",
            {"messages": [{"role": "assistant", "tool_calls": [{"arguments": {}}]}]},
            r"f.csv row 3: message 1: a tool call should be an object with `name`",
        ),
        ("sharegpt", {"conversations": [{"value": "x"}]}, r"f.csv row 3: message 1 should be an object with `role`"),
        ("sharegpt", {"conversations": []}, r"f.csv row 3: `conversations` should be a list"),
        (
            "sharegpt",
            {"conversations": [{"from": "function_call", "value": "f("}]},
            r"f.csv row 3: message 1: the function call: invalid JSON",
        ),
        ("preference", {"chosen": "c", "rejected": "r"}, r"f.csv row 3: column 'prompt' does not exist"),
        ("preference", {"prompt": "q", "rejected": "r"}, r"f.csv row 3: column 'chosen' does not exist"),
        ("preference", {"prompt": "q", "chosen": " "}, r"f.csv row 3: the answer is empty"),
        (
            "preference",
            {"question": "q", "chosen": "so it is", "rejected": "so it was"},
            r"f.csv row 3: column 'prompt' does not exist; rename 'question' to 'prompt', or remove it if",
        ),
        (
            "preference",
            {"prompt": "s", "chosen": list(said("q", "a")), "rejected": list(said("q", "b"))},
            r"f.csv row 3: column 'chosen' begins with a message of the user, and no message has the text of 'prompt'",
        ),
        ("ranked", {"prompt": "q", "answers": ["a", None], "ranks": [1, 2]}, r"row 3: .* none of them null, in one of"),
        ("instruction", {"instruction": "i", "instances": []}, r"f.csv row 3: 0 `instances`; expected one"),
    ],
)
def test_bad_rows(form, row, message):
    with pytest.raises(FtjaxError, match=message):
        renderer(form)(row, "f.csv row 3")


@pytest.mark.parametrize("more", [{"train": False}, {"reasoning_content": "Hm."}, {"tool_calls": [{"name": "f"}]}])
def test_an_empty_message_that_says_nothing_wrong(more):
    rendered = renderer("messages")({"messages": [CHAT[0], EMPTY | more, *CHAT]}, "row 1")
    assert [message["content"] for message in rendered.messages][1] == ""


def test_bad_settings():
    with pytest.raises(FtjaxError, match="no known form fits the columns query, answer"):
        guess(["query", "answer"])
    with pytest.raises(FtjaxError, match=r'unknown form \'promt\' \(did you mean "prompt"\?\)'):
        renderer("promt")
    with pytest.raises(FtjaxError, match="data.completion is empty"):
        renderer("template", "{a}", "")
    with pytest.raises(FtjaxError, match="names no {column}"):
        renderer("template", "{a}", "yes")
    with pytest.raises(FtjaxError, match="row 1: the answer is empty"):
        renderer("template", "{a}", "\n{b}")({"a": "x", "b": ""}, "row 1")
    with pytest.raises(FtjaxError, match="data.template='chatml': rows of form text are not conversations"):
        renderer("text", template="chatml")
    with pytest.raises(FtjaxError, match="row 1: data.system needs conversations, and this row is not one"):
        renderer("prompt", system="s")({"prompt": "p", "completion": "c"}, "row 1")
