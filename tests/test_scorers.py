"""The scorers on any script and on symbols, against naive versions of their rules."""

import itertools
import string
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

import metrics

ROOT = Path(metrics.__file__).parent
# The labels of the accuracy tasks of SuperNI.
LABELS = {"task363_sst2_polarity_classification": ("POS", "NEG"),
          "task875_emotion_classification": ("sadness", "joy", "love", "anger", "fear", "surprise"),
          "task1687_sentiment140_classification": ("positive", "negative")}
drawn = settings(max_examples=300, derandomize=True, deadline=None, database=None)
rouge_score = RougeScorer(["rougeL"], use_stemmer=True)


# Exact match

EQUAL = [
    ("(a)", "a"), ("Yes.", "yes"), ('"positive"', "positive"), ("POS", "pos"), ("[yes].", "yes"),
    ("a)", "a"), ("a", "(a"), ("yes!?", "Yes"), ("  a\t\n b ", "A B"), ("5.", "5"), ("C#.", "c#"),
    (": yes", "yes"), ("...yes", "yes"), (". 5", "5"), ("[(a)]", "a"), ("'.yes'", "yes"),
    ("f(x).", "f(x)"), ("(f(x))", "f(x)"),
    ("+.", "+"), ("+", " + "), (".", "."), ("", ""), ("", " \n"),
    # Punctuation of other scripts and languages.
    ("北京。", "北京"), ("「北京」", "北京"), ("『北京』！", "北京"), ("（北京）", "北京"),
    ("北京，", "北京"), ("北京：", "北京"), ("北京；", "北京"), ("北京？", "北京"),
    ("、北京、", "北京"), ("【是】", "是"), ("《是》", "是"), ("\u2e02a\u2e03", "a"), ("አዎ።", "አዎ"),
    ("نعم؟", "نعم"), ("نعم،", "نعم"), ("نعم؛", "نعم"), ("हाँ।", "हाँ"),
    ("այո։", "այո"), ("այո՞", "այո"), ("‹oui›", "oui"), ("ναι\u037e", "ναι"),
    ("¿Sí?", "sí"), ("¡No!", "no"), ("¿5?", "5"), ("«да»", "да"), ("»ja«", "ja"), ("„ja“", "ja"),
    # One text in two Unicode forms, cases or typographies.
    ("caf\u00e9", "cafe\u0301"), ("\ud55c", "\u1112\u1161\u11ab"), ("\u212b", "\u00e5"),
    ("STRASSE", "straße"), ("ΣΟΦΟΣ", "σοφος"), ("\ufb01n", "FIN"), ("\u1f80\u0301", "\u1f84"),
    ("don’t", "don't"), ("don‘t", "don't"), ("п\u02bcять", "п’ять"), ("say “a” now", 'say "a" now'),
    ("say „a‟ now", 'say "a" now'), ("\u22121", "-1"), ("1\u20132", "1-2"), ("a\u2014b", "a-b"),
    ("a\u2010b", "a-b"), ("a\u2011b", "a-b"), ("a\u2012b", "a-b"), ("a\u2015b", "a-b"),
    ("\ufe63", "-"), ("\ufe58", "-"), ("\uff0d", "-"), ("\uff0b", "+"), ("\u2212", "-"),
    ("10\u00a0km", "10 km"), ("10\u202fkm", "10 km"), ("10\u2007km", "10 km"),
    ("北\u3000京", "北 京"),
    ("so…so", "so...so"), ("…", "..."), ("‥", ".."), ("ＡＢＣ１２３", "abc123"), ("Ｃ＃", "C#"),
    ("￥5", "¥5"), ("ﾃﾞｰﾀ", "データ"), ("co\u00adop", "coop"), ("\ufeffyes", "yes"),
    ("yes\u200b", "yes"), ("\u200fנכון", "נכון"), ("✔\ufe0f", "✔"), ("ســـلام", "سلام"),
]
DIFFERENT = [
    ("+", "-"), ("1", "-1"), ("1.5", "15"), ("C#", "C++"), ("C", "C#"), ("", "+"), (".", ""),
    ("5%", "5"), ("$5", "5"), ("#5", "5"), ("a*", "a"), ("a&b", "ab"), ("@a", "a"), ("/a", "a"),
    ("a\\", "a"), ("a_", "a"), ("a-", "a"), ("~5", "5"), ("5°", "5"), ("<", ">"), ("<a>", "a"),
    (".5", "5"), ("0.5", "05"), ("1,000", "1000"), ("(.5)", "5"), ("!=", "="), (":=", "="),
    (".*", "*"), ("=)", "=("), (":-)", ":-("), (":)", ":("), ("()", "[]"), ("(", ")"), ("?", "!"),
    (".", "..."), ("'", '"'), ("f(x)", "f(x"), ("int[]", "int"), ("f()", "f"), ("{}", ""),
    ("e.g.", "eg"), ("U.S.", "US"), ("well-known", "wellknown"), ("a - b", "a b"),
    ("don't", "dont"), ("5%", "5."), ("e.g. 5%", "5"),
    ("the cat", "cat"), ("cats", "cat"), ("ab", "a b"), ("北京", "上海"), ("北京", "北 京"),
    ("。", ""), ("。", "."), ("café", "cafe"), ("x²", "x2"), ("½", "12"), ("①", "1"), ("👍", "👎"),
    ("👍", ""), ("नहीं", "नही"), ("か", "が"), ("←", "→"), ("≤", "≥"), ("≠", "="), ("‰", "%"),
    ("a‰", "a"),
]


@pytest.mark.parametrize("one, other, expected", [(*pair, 100.0) for pair in EQUAL]
                         + [(*pair, 0.0) for pair in DIFFERENT])
def test_exact_match(one, other, expected):
    """Case, typography and punctuation at the ends do not count; everything else does."""
    for pair in ((one, other), (other, one)):
        value = metrics.exact_match(*pair)
        assert isinstance(value, float) and value == expected


# The rule for ASCII and some more, character by character.
STOPS, QUOTES, OPENING, CLOSING = ".,:;!?。，", "\"'«»", "([{（「¿", ")]}）」"
OTHERS = "aAbé5-+=#%&*@/\\$_ \t北"
FORMS = str.maketrans({"（": "(", "）": ")", "，": ",", "\t": " "})


def naive_bare(text):
    """What exact match compares, by loops over the characters of the alphabet above."""
    chars = list(" ".join(text.lower().translate(FORMS).split()))

    def comes_off_left():
        if chars[0] in OPENING + QUOTES + " 「」":
            return chars[0] not in ")]}"
        rest = "".join(chars).lstrip(STOPS)
        return chars[0] in STOPS and rest and (
            rest[0].isalpha() or rest[0] in OPENING + QUOTES + " 」")

    def comes_off_right():
        if chars[-1] in STOPS + QUOTES + " 「」":
            return True
        before = [char for char in chars[:-1] if char in "()[]{}「」"]
        return chars[-1] in ")]}" and not (before and before[-1] in "([{「")

    while chars and comes_off_left():
        del chars[0]
    while chars and comes_off_right():
        del chars[-1]
    return "".join(chars) or " ".join(text.lower().translate(FORMS).split())


texts = st.text(st.sampled_from(STOPS + QUOTES + OPENING + CLOSING + OTHERS), max_size=7)


@drawn
@given(texts, texts)
def test_exact_match_against_naive_loops(one, other):
    """Two texts as drawn, and a text with its naive form, which must match."""
    expected = 100.0 if naive_bare(one) == naive_bare(other) else 0.0
    assert metrics.exact_match(one, other) == expected
    assert metrics.exact_match(one, naive_bare(one)) == 100.0


@drawn
@given(st.text(max_size=12), st.text(max_size=12))
def test_exact_match_is_symmetric(one, other):
    """And every text equals itself, in each of Unicode's canonical forms, under both metrics."""
    assert metrics.exact_match(one, other) == metrics.exact_match(other, one)
    assert metrics.rouge_l(one, one) == 100.0
    for form in ("NFC", "NFD"):
        assert metrics.exact_match(one, unicodedata.normalize(form, one)) == 100.0


def test_only_punctuation_is_stripped():
    """Of ASCII, only sentence punctuation, quotes and brackets come off the ends."""
    stripped = {char for char in string.punctuation
                if metrics.exact_match(f"a{char}", "a") or metrics.exact_match(f"{char}a", "a")}
    assert stripped == set(".,:;!?\"'()[]{}")


def test_long_runs_of_punctuation_take_no_time():
    """A model may repeat one character as long as it likes: the edges are found in linear time."""
    for text in (")" * 200_000 + "x", "a" + " (a" * 50_000 + ")" * 50_000, "." * 200_000 + "5"):
        assert metrics.exact_match(text, "x") == 0.0


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_superni_labels_score_as_under_the_released_rule(labels):
    """The released rule drops all ASCII punctuation; on labels as models answer, both agree."""
    def released_form(text):
        return text.lower().translate(str.maketrans("", "", string.punctuation)).split()

    before = ("", '"', "'", "(", " ", ". ", ": ", "\n", "...", "[")
    after = ("", ".", '"', "'", '."', '".', ")", "!", "?", ",", ";", ":", " ", "\n", "...", " .")
    cases = (str, str.upper, str.lower, str.title)
    for label, other in itertools.product(labels, [*labels, "", "positive one", "neg"]):
        for left, right, case in itertools.product(before, after, cases):
            prediction = left + case(other) + right
            expected = 100.0 * (released_form(prediction) == released_form(label))
            assert metrics.exact_match(prediction, label) == expected, (prediction, label)


# Rouge-L


@pytest.mark.parametrize("prediction, reference, expected", [
    ("北京", "北京", 100.0), ("北京。", "北京", 100.0), ("北京", "上海", 0.0), ("か", "が", 0.0),
    ("北京是首都", "上海是首都", 60.0),  # three of five characters
    ("北京 2008", "上海 2008", 100 / 3),  # one of three; the digits are one word
    ("да", "нет", 0.0), ("Москва 1", "Киев 1", 50.0), ("Да, конечно!", "да конечно", 100.0),
    ("नमस्ते दुनिया", "नमस्ते", 200 / 3),  # marks belong to their word
    ("が", "か\u3099", 100.0), ("ラーメン", "ラメン", 600 / 7),
    ("すごーーい", "すごーい", 800 / 9),  # the long vowel is of two scripts
    ("กา", "กี", 0.0),  # ก with the mark ี is one word, before the letter า two
    ("ภาษาไทย", "ภาษาไทย", 100.0), ("서울 부산", "서울", 200 / 3), ("مرحبا", "مرحبا", 100.0),
    ("བོད་ཡིག", "བོད་སྐད", 50.0), ("ปี ๒๕๖๗", "ปี ๒๕๖๘", 50.0), ("café", "cafe\u0301", 100.0),
    ("café", "caf", 0.0), ("don’t stop", "don't stop", 100.0), ("ＡＢＣ", "abc", 100.0),
    ("straße", "STRASSE", 100.0), ("x²", "x³", 0.0),
    ("running cafés", "runs cafés", 100.0),  # English words are stemmed among others
    ("cafés", "café", 0.0),  # words with other letters are not
    ("the cat sat", "the cat", 80.0), ("a b c d", "d c b a", 25.0), ("a a a a", "a", 40.0),
    ("a x b y c", "a b c z", 200 / 3),  # the match is not contiguous
    # Without any word on either side, both are compared whole.
    ("", "", 100.0), ("+", "-", 0.0), ("+", "+", 100.0), ("−", "-", 100.0), ("+.", "+", 100.0),
    (".", "", 0.0), ("👍", "👎", 0.0), ("👍", "👍", 100.0), ("✔\ufe0f", "✔", 100.0),
    # With a word on one side only, they share nothing.
    ("+", "plus", 0.0), ("plus", "+", 0.0), ("", "北京", 0.0),
])
def test_rouge_l_of_any_script(prediction, reference, expected):
    """The F1 over words, or characters where a script has no spaces, worked out by hand."""
    value = metrics.rouge_l(prediction, reference)
    assert isinstance(value, float)
    assert value == pytest.approx(expected, abs=1e-9)


SINGLE = ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "THAI", "LAO", "KHMER", "MYANMAR")


def naive_words(text):
    """Words by the categories and names of characters, one after the other."""
    words, open_word, base = [], False, False  # whether a letter, a mark would join the last word
    for char in unicodedata.normalize("NFC", text.casefold()):
        kind, script = unicodedata.category(char)[0], unicodedata.name(char).split()[0]
        if kind == "M" and base:
            words[-1] += char
        elif kind == "L" and script in SINGLE:
            words.append(char)
            open_word, base = False, True
        elif kind in "LN":
            words[-1:] = [words[-1] + char] if open_word else [*words[-1:], char]
            open_word = base = True
        else:
            open_word = base = False
    return words


@drawn
@given(st.text(st.sampled_from("aB1é\u0301 .+’_ßд北京ーラひกี่าລກ្ខမြ한नमि٣๒²½Ⅷ་བོ👍"), max_size=14))
def test_words_against_a_naive_version(text):
    """Alone and in front of other words."""
    assert metrics._words(text) == naive_words(text)
    assert metrics._words(text + " cat") == [*naive_words(text), "cat"]


def released(prediction, reference):
    """Rouge-L as the package computes it, 0 to 100."""
    return 100.0 * rouge_score.score(reference, prediction)["rougeL"].fmeasure


phrases = st.lists(st.one_of(
    st.sampled_from("Running runs relational RELATE happily was sses ied eed xing don't it-was a_b "
                    "1.5 U.S. skies dying news".split()),
    st.text(st.characters(max_codepoint=127), max_size=9)), max_size=8).map(" ".join)


@drawn
@given(phrases, phrases)
def test_rouge_l_of_english_equals_rouge_score(prediction, reference):
    """To the last bit for ASCII, unless neither side has a word."""
    for pair in ((prediction, reference), (prediction, prediction)):
        if any(map(metrics._words, pair)):
            assert metrics.rouge_l(*pair) == released(*pair)
        else:
            assert metrics.rouge_l(*pair) == metrics.exact_match(*pair)


# What a reference holds


@pytest.mark.parametrize(
    "reference, metric, expected",
    [
        ("a word", "rouge_l", True), ("5", "rouge_l", True), ("北京", "rouge_l", True),
        ("+", "rouge_l", False), ("**", "rouge_l", False), ("👍", "rouge_l", False),
        ("", "rouge_l", False), (" \n", "rouge_l", False), ("\u0301", "rouge_l", False),
        ("a word", "accuracy", True), ("+", "accuracy", True), (".", "accuracy", True),
        ("👍", "accuracy", True), ("", "accuracy", False), (" \n", "accuracy", False),
        ("\ufeff", "accuracy", False),
    ],
)
def test_counts_anything(reference, metric, expected):
    """A word for rouge_l, anything to be seen for accuracy."""
    assert metrics.counts_anything(reference, metric) is expected


def test_importing_metrics_is_quick():
    """Neither the import nor a look at references loads a slow library."""
    code = ("import sys, metrics; metrics.counts_anything('a', 'rouge_l'); "
            "slow = {'datasets', 'evaluate', 'nltk', 'numpy', 'rouge_score', 'torch'}; "
            "print(slow & {*sys.modules})")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert done.stdout == "set()\n"
