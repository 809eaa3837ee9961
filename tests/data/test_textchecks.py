"""Checks on one text: what they find, what they leave alone, and what they say of real rows that hold nothing."""

import json

import pytest

from ftjax.data import textchecks as checks

FOUND = {
    "email": [
        "write to jane.doe+x@mail.example.co.uk now",
        "<bob@site.org>",
        "Contact: a_b-c@sub.domain.museum.",
        "mail=me@x.io,you@y.de",
    ],
    "phone": [
        "call +49 30 1234567",
        "+1 (415) 555-2671",
        "ring +44 20 7946 0958!",
        "(212) 555-0142 after six",
        "212-555-0142",
        "fax: 030 1234567",
        "my phone number is 555 0142 99",
        "0049 30 1234567",
    ],
    "card": [
        "pay with 4111 1111 1111 1111",
        "5500-0055-5555-5559",
        "378282246310005",
        "card 6011111111111117.",
    ],
    "key": [
        "AKIAIOSFODNN7EXAMPLE",
        "token ghp_16C7e42F292c6912E7710c838347Ae178B4a",
        "sk-proj-abcDEF123456ghiJKL789mnoPQR",
        "hf_" + "abcdefghij" * 3 + "klmn",
        'api_key = "a8Fk29dKq0Zx81LmPq7T"',
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NSJ9.dBjftJeZ4CVP-mB92K27uhbUJU1p1r",
        "password: hK3vQz81LmPq7Tw5",
    ],
}
CLEAN = [
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.",
    "The total is 1234567890123456 and 100,000,000 more",
    "4111 1111 1111 1112 fails its check digit; so does 0000 0000 0000 0000",
    "In 1998-2004, pages 212-555; room 555-0142",
    "12.345.678,90 + 3.141592653589793",
    "2024-05-12 10:22:33.123",
    "@paulwalk It 's the view from @home",
    "price: $1,200-1,500 at 10:30",
    "version 10.0.19041.1288, ISBN 978-3-16-148410-0",
    "the secret is out: internationalization",
    "token: aaaaaaaaaaaaaaaaaaaaaaaaa",
    "user@localhost and a@b",
    "sk-learn is short for scikit-learn and skateboarding-in-the-park",
    "555*212*5551212=1 and (800) 555 + 1",
]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_personal_data_is_found_and_masked(kind, text):
    kinds = [k for k, _, _ in checks.personal(text)]
    assert kinds and set(kinds) == {kind}
    masked = checks.mask(text)
    assert masked.count(f"[{kind.upper()}]") == len(kinds)
    assert checks.personal(masked) == [] and checks.mask(masked) == masked


@pytest.mark.parametrize("text", CLEAN)
def test_numbers_and_words_are_not_personal_data(text):
    assert checks.personal(text) == [] and checks.mask(text) == text


def test_spans_are_those_of_the_data_alone():
    text = "phone: 030 1234567, mail a@b.org"
    assert [text[start:end] for _, start, end in checks.personal(text)] == ["030 1234567", "a@b.org"]
    assert checks.mask(text) == "phone: [PHONE], mail [EMAIL]"


REAL = ["clichés", "naïve café, Übermut, señor", "Привет, мир", "漢字と仮名", "20 €", "“quoted” – it’s"]


@pytest.mark.parametrize(
    ("text", "table"),
    [(text, "latin-1") for text in REAL] + [("clichés", "cp1252"), ("it’s – naïve", "cp1252"), ("Привет", "cp1251")],
)
def test_text_decoded_by_the_wrong_table_is_mojibake(text, table):
    broken = text.encode("utf-8").decode(table)
    assert not checks.mojibake(f"so {text} it is")
    assert checks.mojibake(f"so {broken} it is")
    assert 3 <= checks.mojibake_at(f"so {broken} it is") < 3 + len(broken)


def test_the_replacement_character_is_mojibake():
    assert checks.mojibake("a number \ufffd of") and checks.mojibake_at("a number \ufffd of") == 9


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("bell\x07", [4]),
        ("nul\x00l", [3]),
        ("\x1b[31mred", [0]),
        ("zero\u200bwidth\ufeff", [4, 10]),
        ("soft\xadhyphen", [4]),
        ("abc\u202edef", [3]),
        ("lone \ud800", [5]),
        ("in\u200dlatin", [2]),
        ("tab\tline\nend\r\n", []),
        ("family \U0001f468\u200d\U0001f469\u200d\U0001f467", []),
        ("می\u200cخواهم", []),
        ("old line\x85end", []),
        ("plain", []),
    ],
)
def test_control_characters_are_found_and_removed(text, at):
    assert checks.control(text) == at
    assert checks.without_control(text) == "".join(c for i, c in enumerate(text) if i not in at)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("Hello, world 1", {"Latin": 10}),
        ("clichés", {"Latin": 7}),
        ("Мир ok", {"Cyrillic": 3, "Latin": 2}),
        ("漢字 かな カナ", {"Han": 2, "Hiragana": 2, "Katakana": 2}),
        ("مرحبا", {"Arabic": 5}),
        ("123 !?", {}),
    ],
)
def test_letters_are_counted_by_script(text, counts):
    assert dict(checks.scripts(text)) == counts


@pytest.mark.parametrize(
    ("text", "refuses", "is_boilerplate"),
    [
        ("I'm sorry, but I can't help with that.", True, False),
        ("I\u2019m sorry, but I can\u2019t assist with this request.", True, False),
        ("Unfortunately, I cannot provide medical advice.", True, False),
        ("As an AI language model, I am not able to browse the internet.", True, True),
        ("I apologize, but I cannot share personal details.", True, False),
        ("I must decline.", True, False),
        ("As an AI assistant, I think so.", False, True),
        ("Sure! Here is a list:", False, True),
        ("Paris. Let me know if you have any other questions!", False, True),
        ("N/A", False, True),
        ("Lorem ipsum dolor sit amet", False, True),
        ("I can't believe it is not butter", False, False),
        ("Sorry seems to be the hardest word", False, False),
        ("i am unable to sleep at night", False, False),
        ("She said: I cannot help you, and left.", False, False),
        ("Unfortunately, the film was long.", False, False),
        ("The AI language model was released in May.", False, False),
        ("none of them", False, False),
        ("Sure, he went home.", False, False),
    ],
)
def test_refusals_and_set_phrases(text, refuses, is_boilerplate):
    assert checks.refusal(text) == refuses and checks.boilerplate(text) == is_boilerplate


def test_word_problems_hold_no_personal_data_and_reviews_no_mojibake(shared):
    problems = [json.loads(line) for line in (shared / "data/gsm8k/train.jsonl").read_text().split("\n") if line]
    assert [row for row in problems if checks.personal(row["question"]) or checks.personal(row["answer"])] == []
    assert not any(checks.refusal(row["answer"]) or checks.boilerplate(row["answer"]) for row in problems)
    reviews = [line.split("\t")[1] for line in (shared / "data/sst2/train.tsv").read_text().split("\n")[1:] if line]
    accented = [text for text in reviews if not text.isascii()]
    assert len(accented) > 400 and not any(map(checks.mojibake, accented))
    assert not any(map(checks.personal, reviews[::5]))
