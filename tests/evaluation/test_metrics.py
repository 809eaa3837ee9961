"""Metrics against the libraries' own figures and against cases worked out by hand."""

import json
import re
import sys
import unicodedata
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from ftjax.errors import FtjaxError
from ftjax.evaluation.compare import table
from ftjax.evaluation.metrics import METRICS, final_number, find, score

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = SimpleNamespace(words="src")


def test_rouge_l_is_the_best_f1_over_references():
    from rouge_score.rouge_scorer import RougeScorer

    predictions = ["The cats sat on mats.", "nothing alike", ""]
    references = [["A cat sits on a mat.", "the cat sat on the mat"], ["zebra"], ["x", "y z"]]
    figure, scores = score("rouge_l", predictions, references, [{}] * 3, SETTINGS)
    one = RougeScorer(["rougeL"], use_stemmer=True)
    best = [max(one.score(r, p)["rougeL"].fmeasure for r in rs) for p, rs in zip(predictions, references)]
    assert scores == pytest.approx(best) and figure == pytest.approx(np.mean(best))
    # the | cat sat on mat: 5 of 5 words in order, of 6
    assert scores[0] == pytest.approx(2 * 1 * (5 / 6) / (1 + 5 / 6))
    assert scores[1:] == [0.0, 0.0]


def test_coverage_counts_distinct_stems():
    predictions = ["He threw the ball; dogs were running.", "RUN", "no", "running-dogs"]
    rows = [{"src": "throw dog run"}, {"src": "run run"}, {"src": ["field", "look"]}, {"src": "dog run walk fly"}]
    figure, scores = score("coverage", predictions, [[""]] * 4, rows, SETTINGS)
    assert scores == pytest.approx([2 / 3, 1.0, 0.0, 0.5])  # Porter's stem of `threw` is not that of `throw`
    assert figure == pytest.approx(np.mean(scores))


def test_exact_match_disregards_white_space_only():
    _, scores = score("exact_match", [" a  b\n", "A b", "c"], [["x", "a b"], ["a b"], ["d"]], [{}] * 3, SETTINGS)
    assert scores == [1.0, 0.0, 0.0]


SCRIPTS = (
    "今天天气很好，我们去公园。", "今日は天気がいいので公園へ行きます。", "오늘은 날씨가 정말 좋아요.",
    "الطقس جميل اليوم هنا", "आज मौसम बहुत अच्छा है", "сегодня очень хорошая погода", "σήμερα έχει πολύ ωραίο καιρό",
    "วันนี้อากาศดีมาก", "היום מזג האוויר נעים", "ဒီနေ့ ရာသီဥတု ကောင်းတယ်", "আজ আবহাওয়া খুব ভালো", "Žluťoučký kůň úpěl ďábelské ódy",
)  # fmt: skip
WHOLE = ("exact_match", "token_f1", "rouge_1", "rouge_2", "rouge_l", "bleu", "chrf")


@pytest.mark.parametrize("name", WHOLE)
def test_an_answer_equal_to_its_reference_has_the_best_score_in_every_script(name):
    pytest.importorskip("sacrebleu")
    composed = [unicodedata.normalize(form, text) for text, form in zip(SCRIPTS, ("NFC", "NFD") * 6)]
    figure, scores = score(name, composed, [[text] for text in SCRIPTS], [{}] * len(SCRIPTS), SETTINGS)
    assert scores == pytest.approx([METRICS[name].best] * len(SCRIPTS)) and figure == pytest.approx(METRICS[name].best)
    if name != "chrf":  # which knows characters alone
        _, scores = score(name, SCRIPTS, [[t] for t in SCRIPTS[1:] + SCRIPTS[:1]], [{}] * len(SCRIPTS), SETTINGS)
        assert max(scores) < 0.35 * METRICS[name].best


@pytest.mark.parametrize("name", ["exact_match", "token_f1", "rouge_1", "rouge_l"])
def test_an_answer_without_letters_equal_to_its_reference_has_the_best_score(name):
    texts = ["👍❤️", "!!!", "<=", "+", ":)", "The", "A"]
    assert score(name, texts, [[text] for text in texts], [{}] * len(texts), SETTINGS)[1] == [1.0] * len(texts)
    _, scores = score(name, texts, [[text] for text in texts[1:] + texts[:1]], [{}] * len(texts), SETTINGS)
    assert scores == [0.0] * len(texts)


def test_scripts_without_spaces_are_counted_by_character():
    said, right = "我们去公园", "今天我们去大公园"
    for name in ("rouge_1", "token_f1", "rouge_l"):
        # 5 of 5 characters, of 8
        assert score(name, [said], [[right]], [{}], SETTINGS)[0] == pytest.approx(2 * (5 / 8) / (1 + 5 / 8))
    assert score("length", [said], [[right]], [{}], SETTINGS)[0] == 5
    assert score("distinct_1", ["去去公园"], [[right]], [{}], SETTINGS)[0] == 3 / 4
    assert score("coverage", ["我们去公园"], [[""]], [{"src": "公园 बस"}], SETTINGS)[0] == pytest.approx(2 / 3)
    assert score("coverage", ["हम बस से जाते हैं"], [[""]], [{"src": "बस सब"}], SETTINGS)[0] == 0.5


def test_bleu_of_chinese_is_that_of_sacrebleus_tokenizer():
    sacrebleu = pytest.importorskip("sacrebleu")
    said, right = (
        ["我们今天去公园玩。", "天气真的很好，iPhone 15 很贵"],
        ["我们去公园玩吧。", "今天天气很好，iPhone 15 太贵了"],
    )
    figure, scores = score("bleu", said, [[text] for text in right], [{}] * 2, SETTINGS)
    assert figure == pytest.approx(sacrebleu.corpus_bleu(said, [right], tokenize="zh").score) and 0 < figure < 100
    theirs = sacrebleu.BLEU(tokenize="zh", effective_order=True)
    assert scores == pytest.approx([theirs.sentence_score(s, [r]).score for s, r in zip(said, right)])


@given(st.text(alphabet=st.characters(max_codepoint=127)), st.text(alphabet=st.characters(max_codepoint=127)))
def test_rouge_of_ascii_text_is_rouge_scores_own(said, right):
    from rouge_score.rouge_scorer import RougeScorer

    if any(not any(map(str.isalnum, text)) for text in (said, right)):
        return  # rouge-score sees nothing there
    theirs = RougeScorer(["rougeL"], use_stemmer=True).score(right, said)["rougeL"].fmeasure
    assert score("rouge_l", [said], [[right]], [{}], SETTINGS)[0] == (theirs if right.strip() else None)


def test_a_score_that_is_not_defined_is_none():
    for name in ("exact_match", "token_f1", "rouge_l", "chrf", "bleu", "number_match"):
        pytest.importorskip("sacrebleu")
        assert score(name, ["", "7 a b c"], [[" "], ["", "7 a b c"]], [{}] * 2, SETTINGS)[1][0] is None
        assert score(name, ["", ""], [[" "], []], [{}] * 2, SETTINGS) == (None, [None, None])
        # An empty reference beside a real one is no right answer.
        assert score(name, [""], [["", "7"]], [{}], SETTINGS)[1] == [0.0]
    assert score("bleu", ["Paris"], [["Paris"]], [{}], SETTINGS) == (None, [pytest.approx(100)])
    assert score("bleu", ["Paris"], [["in the city of Paris"]], [{}], SETTINGS)[0] == 0
    by_reference = SimpleNamespace(passage="")
    assert score("unsupported", ["", "Dogs bark."], [["Dogs bark."]] * 2, [{}] * 2, by_reference) == (0, [None, 0])


def test_bleu_is_that_of_the_corpus():
    sacrebleu = pytest.importorskip("sacrebleu")
    predictions = ["the cat sat on the mat today", "a dog ran through the green field"]
    references = [["the cat sat on the mat", "a cat is on the mat today"], ["the dog ran through the field"]]
    figure, scores = score("bleu", predictions, references, [{}] * 2, SETTINGS)
    streams = [["the cat sat on the mat", "the dog ran through the field"], ["a cat is on the mat today", None]]
    assert figure == pytest.approx(sacrebleu.corpus_bleu(predictions, streams).score)
    assert scores == pytest.approx([sacrebleu.sentence_bleu(p, r).score for p, r in zip(predictions, references)])
    assert figure != pytest.approx(np.mean(scores))


def test_bleu_in_lower_case_is_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    predictions = ["The Cat sat on the MAT today", "A dog ran through the Green field"]
    references = [["the cat sat on the mat", "a cat is on THE mat today"], ["The dog ran through the field"]]
    figure, scores = score("bleu_lower", predictions, references, [{}] * 2, SETTINGS)
    streams = [["the cat sat on the mat", "The dog ran through the field"], ["a cat is on THE mat today", None]]
    assert figure == pytest.approx(sacrebleu.corpus_bleu(predictions, streams, lowercase=True).score)
    lower = sacrebleu.BLEU(lowercase=True, effective_order=True)
    assert scores == pytest.approx([lower.sentence_score(p, r).score for p, r in zip(predictions, references)])
    assert figure > score("bleu", predictions, references, [{}] * 2, SETTINGS)[0]


def commongen(n):
    """Sentences of people as predictions, those of others for the same words as references."""
    groups = {}
    for line in (ROOT / "ftjax/assets/commongen/validation.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        groups.setdefault(row["src"], []).append(row["tgt"])
    several = [group for group in groups.values() if len(group) > 1][:n]
    return [group[0] for group in several], [group[1:] for group in several]


@pytest.mark.parametrize("name, theirs", [("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")])
def test_rouge_is_that_of_rouge_score(name, theirs):
    from rouge_score.rouge_scorer import RougeScorer

    predictions, references = commongen(60)
    figure, scores = score(name, predictions, references, [{}] * len(predictions), SETTINGS)
    scorer = RougeScorer([theirs], use_stemmer=True)
    best = [max(scorer.score(r, p)[theirs].fmeasure for r in rs) for p, rs in zip(predictions, references)]
    assert scores == pytest.approx(best) and figure == pytest.approx(np.mean(best)) and 0 < figure < 1


def test_chrf_is_that_of_the_corpus():
    sacrebleu = pytest.importorskip("sacrebleu")
    predictions, references = commongen(60)
    figure, scores = score("chrf", predictions, references, [{}] * len(predictions), SETTINGS)
    most = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    assert figure == pytest.approx(sacrebleu.corpus_chrf(predictions, streams).score)
    assert scores == pytest.approx([sacrebleu.sentence_chrf(p, r).score for p, r in zip(predictions, references)])
    assert figure != pytest.approx(np.mean(scores))


def test_token_f1_is_squads():
    predictions = ["The cat sat.", "a red, red ball", "", "an the", "Paris"]
    references = [["cat sat"], ["red ball", "ball"], ["x"], ["the"], ["in Paris, France", "London"]]
    _, scores = score("token_f1", predictions, references, [{}] * 5, SETTINGS)
    # red red ball | red ball: 2 common, 2/3 and 2/2; v1.1 gives 0 where no word is left; paris | in paris france.
    assert scores == pytest.approx([1, 0.8, 0, 0, 0.5])


OFFICIAL = re.compile(r"#### (\-?[0-9\.\,]+)")  # grade_school_math/dataset.py


def test_the_final_number_is_gsm8ks_on_its_own_answers(shared):
    answers = [
        json.loads(line)["answer"]
        for name in ("train", "test")
        for line in (shared / f"data/gsm8k/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    official = [OFFICIAL.search(a)[1].replace(",", "") for a in answers]
    assert len(answers) == 8792 and [final_number(a) for a in answers] == [Decimal(o) for o in official]
    # Without the mark, an answer is judged by its last number.
    plain = [a.replace("####", "The answer is") + "." for a in answers]
    assert [final_number(p) for p in plain] == [Decimal(o) for o in official]
    wrong = [answers[i - 1] for i in range(len(answers))]
    figure, scores = score("number_match", answers, [[w] for w in wrong], [{}] * len(answers), SETTINGS)
    assert scores == [float(a == b) for a, b in zip(map(Decimal, official), map(Decimal, official[-1:] + official))]
    assert 0 < figure < 0.1


@pytest.mark.parametrize(
    "text, number",
    [
        ("#### 1,234", "1234"),
        ("so 3 + 4 = 7.", "7"),
        ("it costs $1,050.50.", "1050.50"),
        ("#### $18", "18"),
        ("####-5 and then 6 #### 7", "-5"),
        ("between 10-12", "12"),
        ("minus -3", "-3"),
        ("so x = \u22123.", "-3"),
        ("#### \u22121,234", "-1234"),
        ("-$2", "-2"),
        ("a half is .5", ".5"),
        ("18.00", "18"),
        ("5 #### none", None),
        ("nothing", None),
        ("####", None),
    ],
)
def test_the_final_number_of_a_text(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


@given(st.decimals(-(10**9), 10**9, places=2), st.text(alphabet="abc .,$#", max_size=9))
def test_a_number_is_read_as_it_is_written(value, before):
    for written in (f"{value:,}", f"{value}", f"{value:,}."):
        assert final_number("#### " + written) == value
        if "####" not in before:
            assert final_number(before + " " + written) == value


def test_unsupported_is_told_of_the_passage_or_else_of_the_best_reference():
    rows = [{"text": "William conquered England in 1066."}] * 2
    said = ["William conquered England.", "William conquered England in 1067. The Alps are far. He won."]
    by_passage, by_reference = SimpleNamespace(passage="text"), SimpleNamespace(passage="")
    assert score("unsupported", said, [["x"], ["x"]], rows, by_passage)[1] == [0, 1]
    figure, scores = score("unsupported", said, [["x", said[0]], ["Far are the Alps."]], rows, by_reference)
    assert scores == [0, pytest.approx(2 / 3)] and figure == pytest.approx(1 / 3)
    with pytest.raises(FtjaxError, match="evaluate.passage: the metric unsupported needs text in the column 'txt'"):
        score("unsupported", said, [["x"], ["x"]], rows, SimpleNamespace(passage="txt"))
    assert find("unsupported").higher is False


def test_distinct_counts_ngrams_of_all_answers_together():
    predictions = ["a b a b", "A c", "x", ""]
    one, ones = score("distinct_1", predictions, [[""]] * 4, [{}] * 4, SETTINGS)
    two, twos = score("distinct_2", predictions, [[""]] * 4, [{}] * 4, SETTINGS)
    assert ones == [0.5, 1, 1, None] and one == pytest.approx(4 / 7)  # a b c x of 7 words
    assert twos == [pytest.approx(2 / 3), 1, None, None] and two == pytest.approx(3 / 4)  # ab ba ac of 4 pairs
    assert score("length", predictions, [[""]] * 4, [{}] * 4, SETTINGS)[1] == [4, 2, 1, 0]


@given(st.lists(st.text(alphabet="ab c.", max_size=12), min_size=1, max_size=4))
def test_scores_stay_in_their_range_and_oneself_is_matched(texts):
    # Words of ASCII letters alone, so that none of the metrics is left without a word.
    predictions = [text + " word" for text in texts]
    for name in ("exact_match", "token_f1", "rouge_1", "rouge_2", "rouge_l", "distinct_1", "distinct_2"):
        figure, scores = score(name, predictions, [[p] for p in predictions], [{}] * len(texts), SETTINGS)
        there = [s for s in (figure, *scores) if s is not None]
        assert all(0 <= s <= 1 for s in there) and (name == "distinct_2" or len(there) == len(texts) + 1)
        if name in ("exact_match", "token_f1", "rouge_1", "rouge_l"):
            assert scores == [1.0] * len(texts)


USERS = """
def shout(prediction, references, row):
    return sum(map(str.isupper, prediction)) + len(references) / row["weight"]

def errors(prediction, references, row):
    return len(prediction)
errors.higher = False

def words(prediction, references, row):
    return prediction

def taken(prediction, references, row):
    return len(references.pop()) + row.pop("weight")["list"].pop()

shade = 2
"""


def test_a_metric_of_the_users_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(USERS)
    figure, scores = score(f"{file}:shout", ["AbC", "d"], [["x"], ["y", "z"]], [{"weight": 2}] * 2, SETTINGS)
    assert scores == [2.5, 1.0] and figure == 1.75
    row = {"weight": {"list": [2]}}  # what a function takes out of the row is there for the next answer
    assert score(f"{file}:taken", ["A", "B"], [["x"], ["y"]], [row, row], SETTINGS)[1] == [3, 3]
    assert find(f"{file}:shout").higher and not find(f"{file}:errors").higher
    for name, message in (
        (f"{file}:shuot", "has no function 'shuot' .did you mean \"shout\""),
        (f"{file}:shade", "has no function 'shade'$"),  # it is a number
        (f"{tmp_path}/other.py:shout", 'expected "file.py:name"; .*other.py\' is not a file'),
        (f"{file}:words", "prediction 1: evaluate.metrics .*returned 'AbC'; expected a finite number"),
        (f"{file}:shout", "prediction 1: evaluate.metrics .* failed at line 3: KeyError: 'weight'"),
    ):
        with pytest.raises(FtjaxError, match=message):
            score(name, ["AbC"], [["x"]], [{}], SETTINGS)
    file.write_text("def shout(prediction, references, row):\n    return 7\n# edited\n")
    assert score(f"{file}:shout", ["AbC"], [["x"]], [{}], SETTINGS)[0] == 7


def test_the_table_calls_no_length_better():
    before = {"length": 5.0, "rouge_l": 0.2, "perplexity": 9.0, "samples": []}
    after = {"length": 7.0, "rouge_l": 0.1, "perplexity": 8.0, "samples": []}
    lines = {line.split()[1]: line for line in table(before, after, 1).splitlines() if len(line.split()) > 2}
    assert "better" in lines["perplexity"] and "worse" in lines["rouge_l"]
    assert not {"better", "worse"} & set(lines["length"].split()) and "↑" not in lines["length"]


def test_a_reference_without_a_number_is_named():
    with pytest.raises(FtjaxError, match="prediction 2: number_match: the reference 'ten' contains no number"):
        score("number_match", ["1", "2"], [["1"], ["3", "ten"]], [{}] * 2, SETTINGS)
    assert set(METRICS) >= {"token_f1", "chrf", "number_match"}


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("rogue_l", {}, "unknown metric 'rogue_l' \\(did you mean \"rouge_l\"\\?\\)"),
        ("coverage", {"scr": "a"}, "found 'src' \\(did you mean \"scr\"\\?\\), the columns are scr"),
        ("coverage", {"src": " "}, "the column 'src' contains no word"),
    ],
)
def test_bad_input_is_named(name, row, message):
    with pytest.raises(FtjaxError, match=message):
        score(name, ["a"], [["a"]], [row], SETTINGS)


def test_no_predictions_is_refused():
    with pytest.raises(FtjaxError, match="no predictions"):
        score("rouge_l", [], [], [], SETTINGS)


def test_f1_macro_is_that_of_scikit_learn_and_does_not_need_it(monkeypatch):
    rng = np.random.default_rng(0)
    for N in (1, 7, 40):
        right = [f"label {k}" for k in rng.integers(4, size=N)]
        said = [text if rng.random() < 0.5 else f"label {rng.integers(6)}" for text in right]
        wanted = sk.f1_score(right, said, labels=sorted(set(right)), average="macro", zero_division=0)
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "sklearn.metrics", None)  # an import of it fails: only tests install it
            assert METRICS["f1_macro"].corpus(said, [[text] for text in right]) == pytest.approx(wanted, abs=1e-12)
    assert METRICS["f1_macro"].corpus(["b", "x"], [["a", "b"], ["b"]]) == pytest.approx(2 / 3)  # b is right once of two
