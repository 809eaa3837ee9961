"""Support of claims on sentences that a person has judged, and on real passages with questions of their own."""

import json

import pytest

from ftjax.evaluation.support import claims, unsupported_rate

PASSAGE = (
    "The Norman dynasty had a major political impact on medieval Europe. Duke William conquered England in 1066, "
    "with about 7,000 men. The Normans were famed for their martial spirit."
)


def test_a_claim_is_supported_by_its_content_and_its_numbers():
    answer = (
        "William, the duke, conquered England in 1066. He had 7000 men! The army brought elephants and crossed the "
        "Alps. He conquered England in 1067.\nThe Normans impacted medieval Europe politically. It was so."
    )
    found = claims(answer, PASSAGE)
    assert [claim.supported for claim in found] == [True, True, False, False, True]  # `It was so.` claims nothing
    assert [claim.share for claim in found[:2]] == [1, 1] and found[3].numbers == ("1067",)
    assert found[2].text == "The army brought elephants and crossed the Alps."
    assert unsupported_rate(answer, PASSAGE) == pytest.approx(2 / 5)
    assert unsupported_rate("", PASSAGE) is None and unsupported_rate("Elephants.", "") == 1


@pytest.mark.parametrize(
    "passage, true, false",
    [
        ("他住在北京。他有两只猫。", "他有猫。", "熊喜欢蜂蜜！"),
        ("वह दिल्ली में रहता है। उसके पास बिल्ली है।", "वह दिल्ली में रहता है।", "भालू शहद खाता था।"),
        ("Он живёт в Москве. У него есть кот.", "Он живёт в Москве.", "Медведи любят мёд!"),
    ],
)
def test_claims_of_other_scripts_are_told_apart(passage, true, false):
    found = claims(f"{true}{'' if passage[0] == '他' else ' '}{false}", passage)
    assert [claim.supported for claim in found] == [True, False]


def test_the_order_of_words_does_not_count():
    shuffled = "England conquered William."
    assert claims(shuffled, PASSAGE)[0].share == 1


def test_sentences_of_a_real_passage_are_supported_by_it_and_not_by_another(shared):
    squad = json.loads((shared / "data/squad/dev-v1.1.json").read_text(encoding="utf-8"))
    passages = [article["paragraphs"][0]["context"] for article in squad["data"]][:20]
    own = [unsupported_rate(p, p) for p in passages]
    other = [unsupported_rate(p, q) for p, q in zip(passages, passages[1:] + passages[:1])]
    assert max(own) == 0 and sum(other) / len(other) > 0.9
