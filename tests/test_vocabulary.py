"""Rules for the words of a prompt."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import EXAMPLES, make_clip, paper

from pez_core import UNSAFE_WORDS, ArgumentError, Vocabulary, invert
from pez_core.vocabulary import Blocklist, count_words, english_words


@pytest.mark.parametrize(
    "text, found",
    [
        ("a nude man", "nude"),
        ("NÜDE", "nude"),
        ("n u d e", "nude"),
        ("a nu de man", "nude"),
        ("n-u_d.e", "nude"),
        ("menu details", None),
        ("denude", None),
        ("nudes", None),
        ("hot   dog", "hot dog"),
        ("hotdog", "hot dog"),
        ("shot dog", None),
        ("decapitated", "decapit*"),
        ("decapit", "decapit*"),
        ("de capita tion", "decapit*"),
        ("capital", None),
        ("", None),
    ],
)
def test_blocked_words_are_found_however_they_are_spelled(text, found):
    assert Blocklist(["nude", "hot dog", "decapit*", "  ", "!?"]).find(text) == found


@pytest.mark.parametrize("name", ["\0", "~nobody-of-this-name/words.txt", "a" * 300])
def test_a_name_that_no_file_can_have_is_named(name):
    with pytest.raises(ArgumentError, match="`only` names the file") as error:
        Vocabulary(only=name)
    assert (
        name[:200] in str(error.value).replace(r"\x00", "\0")
        and "a" * 201 not in str(error.value).split("(")[0]
    )


def test_a_blocklist_is_true_where_it_blocks_something():
    assert not Blocklist([]) and not Blocklist(["", " "])
    assert all(map(bool, map(Blocklist, (["a"], ["!"], ["ab*"]))))
    assert Blocklist(["!", "a"]).find_mark("b!") == "!" and Blocklist(["a"]).find_mark("a") is None


def test_words_are_counted_as_they_are_found():
    assert [count_words(text) for text in ("", "n-u de 2!", "\u00fcber  all")] == [0, 4, 2]


def test_the_time_of_a_lookup_does_not_grow_with_the_list():
    def lines(blocked: Blocklist) -> int:
        """Lines of Python that are run to look up a text."""
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            count += event == "line"
            return trace

        sys.settrace(trace)
        try:
            assert blocked.find("a green bird sings in the old tree") is None
        finally:
            sys.settrace(None)
        return count

    few, many = (Blocklist([f"w{k:05}*" for k in range(n)]) for n in (10, 20_000))
    assert lines(many) == lines(few)
    assert many.find("the w19999s") == "w19999*"


def test_only_what_the_given_words_help_to_spell_counts():
    blocked = Blocklist(["nude", "hot dog"])
    assert blocked.find("nude a b", 1) is None
    assert blocked.find("a nude b", 1, 2) == "nude"
    assert blocked.find("a hot dog", 2, 3) == "hot dog"  # only its end was learned
    assert blocked.find("a hot dog", 1, 2) == "hot dog"
    assert blocked.find("a hot dog", 0, 1) is None


def phrases(vocabulary, clip):
    return {clip.text.words.decode(phrase) for phrase in vocabulary.lexicon(clip).phrases}


def test_every_whole_word_of_the_clip(emoji_clip):
    found = {phrase for (phrase,) in Vocabulary(dictionary=False).lexicon(emoji_clip).phrases}
    assert found == set(emoji_clip.vocabulary.tolist())


JUNK = ["tering", "plets", "jong", "ched", "doncasterisgreat", "instagood", "wn", "ter"]
NAMES = ["john", "obama", "kardashian", "johnson", "emily", "picasso", "ronaldo"]
UNKIND = ["transgender", "fat", "ugly", "retarded", "idiot", "gypsy", "obese"]
EMOJI = ["\N{DIRECT HIT}", "\N{ROUND PUSHPIN}"]
WORDS = ["cat", "cats", "paint", "painted", "painting", "colour", "color", "rose", "gothic"]
WORDS += ["japanese", "christmas", "paris", "anime", "a", "of", ","]


@pytest.fixture(scope="module")
def all_tokens():
    """A CLIP with the whole of CLIP's vocabulary."""
    clip = make_clip()
    clip.trained_tokens = None
    return clip


@pytest.fixture(scope="module")
def default(all_tokens):
    return phrases(Vocabulary(), all_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("word", [*JUNK, *NAMES, *UNKIND, *EMOJI, "1", "!"])
def test_the_default_has_no_junk(word, default, all_tokens):
    (one,) = all_tokens.text.words.encode(word)
    assert all_tokens.text.words.round_trips([one])  # it was a word of the vocabulary before
    assert word not in default


@pytest.mark.parametrize("word", WORDS)
def test_the_default_has_words_of_the_dictionary(word, default):
    assert word in default


def test_the_dictionary_leaves_enough_words(default):
    assert 15_000 < len(default) < 20_000
    assert all(word == "," or word.isalpha() for word in default)


def test_listed_phrases_need_not_be_in_the_dictionary(emoji_clip):
    listed = Vocabulary(only=["emoji", "ched", "red car"])
    assert phrases(listed & Vocabulary(ascii_only=True), emoji_clip) == phrases(listed, emoji_clip)
    pieces = Vocabulary(whole_words=False)
    assert pieces.lexicon(emoji_clip) == replace(pieces, dictionary=False).lexicon(emoji_clip)
    words = Vocabulary().lexicon(emoji_clip).phrases
    assert (Vocabulary(dictionary=False) & Vocabulary()).lexicon(emoji_clip).phrases == words
    assert (pieces & Vocabulary()).lexicon(emoji_clip).phrases == words


def test_a_clip_without_english_words_has_all_its_words():
    clip = make_clip()
    emoji = clip.text.words.encode(EMOJI[0])
    clip.trained_tokens = frozenset(emoji)
    assert Vocabulary().lexicon(clip).phrases == {tuple(emoji)}


def test_vocabularies_saved_before_the_dictionary_have_every_word(emoji_clip, tmp_path):
    Vocabulary(ascii_only=True).save(tmp_path / "new.json")
    rules = json.loads((tmp_path / "new.json").read_text())
    assert Vocabulary.load(tmp_path / "new.json").dictionary
    del rules["dictionary"]
    (tmp_path / "old.json").write_text(json.dumps(rules))
    assert not Vocabulary.load(tmp_path / "old.json").dictionary


def test_pieces_and_ascii():
    clip = make_clip()
    pieces = Vocabulary(whole_words=False).lexicon(clip).phrases
    assert len(pieces) == 49406  # all but start and end
    ascii_only = phrases(Vocabulary(whole_words=False, ascii_only=True), clip)
    assert len(ascii_only) < 49000 and all(text.isascii() for text in ascii_only)


def test_floor_on_how_well_trained_a_token_is():
    clip = make_clip(seed=3)
    weak, strong = clip.vocabulary[:2].tolist()
    with torch.no_grad():
        clip.text.token_embedding[weak] *= 0.001
    kept = Vocabulary(min_embedding_std=0.01, dictionary=False).lexicon(clip).phrases
    assert (weak,) not in kept and (strong,) in kept
    assert len(kept) == len(clip.vocabulary) - 1


def test_the_least_deviation_is_inclusive(tiny_clip):
    spread = tiny_clip.text.token_embedding.detach().std(dim=1)
    ids = tiny_clip.vocabulary.tolist()
    token = max(ids, key=lambda i: spread[i].item())
    rules = Vocabulary(min_embedding_std=spread[token].item(), dictionary=False)
    assert rules.lexicon(tiny_clip).phrases == {(token,)}


def test_whole_words_exclude_the_pieces_of_another_rule(tiny_clip):
    words, pieces = Vocabulary(dictionary=False), Vocabulary(whole_words=False)
    found = words.lexicon(tiny_clip).phrases
    assert len(pieces.lexicon(tiny_clip).phrases) > len(found)
    assert (words & pieces).lexicon(tiny_clip).phrases == found


def test_a_bank_file_with_phrases_of_several_tokens(emoji_clip, tmp_path):
    file = tmp_path / "bank.txt"
    file.write_text("\ufeff# a comment\nred car\n\nhappy face with hat\ncat\ncat\nqzxj vvbk\n")
    bank = Vocabulary(only=file)
    assert bank.only == ("red car", "happy face with hat", "cat", "qzxj vvbk")
    assert phrases(bank, emoji_clip) == {"red car", "happy face with hat", "cat"}
    (result,) = invert(emoji_clip, EXAMPLES[0], paper(30, prompt_len=7, vocabulary=bank))
    left = result.prompt
    for phrase in ("happy face with hat", "red car", "cat"):
        left = left.replace(phrase, "")
    assert not left.strip() and len(result.token_ids) == 7


@pytest.mark.slow
def test_a_word_of_several_pieces_from_a_bank():
    clip = make_clip()
    clip.trained_tokens = None
    bank = Vocabulary(only=["rutkowski", "cat"])
    assert sorted(map(len, bank.lexicon(clip).phrases))[-1] > 1
    assert phrases(bank, clip) == {"rutkowski", "cat"}


@pytest.mark.parametrize("whole_words", [True, False])
@pytest.mark.parametrize("caption", ["{}", "a ho {} cat"])
@pytest.mark.slow
def test_no_prompt_holds_a_blocked_word(emoji_clip, whole_words, caption):
    """The best words for the image are forbidden one after the other."""
    free = Vocabulary(whole_words=whole_words)
    blocked = []
    for _ in range(3):
        rules = free & Vocabulary(whole_words=whole_words, block=[*blocked, "ho t"])
        options = paper(40, prompt_len=4, vocabulary=rules)
        (result,) = invert(emoji_clip, EXAMPLES[5], options, caption=caption)
        assert Blocklist([*blocked, "hot"]).find(result.prompt) is None
        # a whole word of the prompt, whatever it was spelled from
        blocked.append(max(result.learned.split(), key=len))
    assert len(set(blocked)) == 3


def test_a_word_is_blocked_when_the_caption_spells_its_first_half(emoji_clip):
    words = emoji_clip.text.words
    house = Vocabulary(only=["dog", "cat"])
    rules = house & Vocabulary(block=["hot dog"])
    options = paper(3, prompt_len=1, vocabulary=rules)
    (result,) = invert(emoji_clip, EXAMPLES[5], options, caption="hot {}")
    assert result.prompt == "hot cat"
    assert words.encode(result.prompt) == result.token_ids


def test_set_operations(emoji_clip):
    pets, wild = Vocabulary(only=["cat", "dog", "fish"]), Vocabulary(only=["fish", "lion"])
    assert phrases(pets & wild, emoji_clip) == {"fish"}
    assert phrases(pets | wild, emoji_clip) == {"cat", "dog", "fish", "lion"}
    assert phrases(pets - wild, emoji_clip) == {"cat", "dog"}
    every = Vocabulary() - wild
    assert "lion" not in phrases(every, emoji_clip) and "cat" in phrases(every, emoji_clip)
    # a list that is taken away is blocked in the decoded prompt, and not only as a token
    assert every.lexicon(emoji_clip).blocked == {"fish", "lion"}
    one, two = Vocabulary(block=["cat", "red"]), Vocabulary(block=["cat"])
    assert (one & two).lexicon(emoji_clip).blocked == {"cat", "red"}
    assert (one | two).lexicon(emoji_clip).blocked == {"cat"}
    assert "cat" not in phrases(one & pets, emoji_clip)


def test_save_and_load(emoji_clip, tmp_path):
    rules = (Vocabulary(only=["cat", "red car"]) | Vocabulary(ascii_only=True)) - Vocabulary(
        only=["dog"], block=["x"], min_embedding_std=0.001
    )
    rules.save(tmp_path / "rules.json")
    again = Vocabulary.load(tmp_path / "rules.json")
    assert again == rules and again.lexicon(emoji_clip) == rules.lexicon(emoji_clip)


def test_a_file_of_many_combined_vocabularies_can_be_used(tmp_path, tiny_clip):
    rules = Vocabulary(only=["cat", "dog", "red"])
    for _ in range(100):
        rules &= Vocabulary(only=["cat", "red"])
    rules.save(tmp_path / "rules.json")
    assert phrases(Vocabulary.load(tmp_path / "rules.json"), tiny_clip) == {"cat", "red"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"only": 3}',
        '{"only": "/etc/hosts"}',
        '{"block": "/etc/hosts"}',
        '{"operation": "^"}',
        "\x00",
        '{"only": ["a"], "words": 1}',
        '{"operation": "|", "left": {}}',
        '{"operation": "&", "right": {}, "left": ' * 101 + "{}" + "}" * 101,
    ],
)
def test_a_file_that_is_no_vocabulary(text, tmp_path):
    (tmp_path / "rules.json").write_text(text)
    with pytest.raises(ValueError, match=r"rules\.json is not a saved vocabulary") as error:
        Vocabulary.load(tmp_path / "rules.json")
    assert "__init__" not in str(error.value)


def test_a_file_that_is_nested_too_deeply(tmp_path):
    (tmp_path / "rules.json").write_text("[" * 100_000)
    with pytest.raises(ArgumentError, match=r"rules\.json is nested too deeply"):
        Vocabulary.load(tmp_path / "rules.json")


def test_the_shipped_list_states_its_source_and_its_limits(emoji_clip):
    head = UNSAFE_WORDS.read_text()
    assert "Source:" in head and "Limits:" in head and "CC BY 4.0" in head
    unsafe = Vocabulary(block=UNSAFE_WORDS, dictionary=False)
    assert len(unsafe.block) > 400 and not any("#" in word for word in unsafe.block)
    left = phrases(unsafe, make_clip())
    assert not {"nude", "sexy", "gore"} & left and {"dog", "class", "menu"} <= left | {"menu"}
    # it leaves an ordinary vocabulary nearly whole
    assert len(phrases(unsafe, emoji_clip)) > 0.99 * len(emoji_clip.vocabulary)


def test_a_bank_of_which_nothing_is_usable_names_the_nearest_words(emoji_clip):
    with pytest.raises(ValueError, match=r"holds 2 phrases, .* near 'dogz' .*: dog, \S+, \S+$"):
        Vocabulary(only=["dogz", "qzxj"]).lexicon(emoji_clip)


@pytest.mark.parametrize(
    "rules, message",
    [
        (lambda: Vocabulary(only=["cat"], block=["cat"]), "another rule forbids them.*coat, "),
        (
            lambda: Vocabulary(only=["cat"]) - Vocabulary(),
            "holds 1 phrases, of which emoji-clip can use none",
        ),
        (lambda: Vocabulary(min_embedding_std=1e6), "leaves no word"),
        (lambda: Vocabulary() - Vocabulary(whole_words=False), "leaves no word"),
        (lambda: Vocabulary(only=[]), "`only` holds no phrase"),
        (lambda: Vocabulary(only="no such file"), "`only` names the file 'no such file'"),
        (
            lambda: Vocabulary(block="nude"),
            "`block` names the file 'nude'.*a list for single words",
        ),
        (lambda: Vocabulary(min_embedding_std=-1), "`min_embedding_std`"),
        (lambda: Vocabulary(only=["cat"]) & Vocabulary(only=["dog"]), "`only` holds 2 phrases"),
        (lambda: Vocabulary(only=["qzxj"]) | Vocabulary(only=["vvbk"]), "`only` holds 2 phrases"),
        (lambda: Vocabulary(only=["qzxj"]) & Vocabulary(block=["a"]), "`only` holds 1 phrases"),
        (lambda: Vocabulary(block=["a"]) & Vocabulary(only=["qzxj"]), "`only` holds 1 phrases"),
        (lambda: Vocabulary(min_embedding_std=1e6) | Vocabulary(only=["qzxj"]), "leaves no word"),
        (lambda: Vocabulary(only=["qzxj"]) | Vocabulary(min_embedding_std=1e6), "leaves no word"),
    ],
)
def test_bad_rules(rules, message, emoji_clip):
    with pytest.raises(ArgumentError, match=message):
        rules().lexicon(emoji_clip)


def test_words_of_the_wrong_type():
    with pytest.raises(TypeError, match="`block` has to hold strings but holds 3"):
        Vocabulary(block=["a", 3])
    with pytest.raises(TypeError, match="`only` has to be a path"):
        Vocabulary(only=3)
    for name in ("ascii_only", "whole_words", "dictionary"):
        with pytest.raises(TypeError, match=f"`{name}`"):
            Vocabulary(**{name: 1})


def test_a_saved_file_is_readable_json(tmp_path):
    Vocabulary(only=["émile"]).save(tmp_path / "rules.json")
    assert json.loads((tmp_path / "rules.json").read_text())["only"] == ["émile"]
    assert (tmp_path / "rules.json").read_text().startswith('{\n "only": [\n  "émile"\n ],\n')
    assert (tmp_path / "rules.json").read_text().endswith("}\n")


def test_rules_without_a_bank_take_phrases_as_a_whole(emoji_clip):
    bank = Vocabulary(only=["red car", "happy dog", "naïve"])
    assert phrases(bank & Vocabulary(block=["dog"], ascii_only=True), emoji_clip) == {"red car"}
    assert "red car" in phrases(Vocabulary(block=["dog"]) & bank, emoji_clip)
    assert phrases(bank - Vocabulary(only=["car"]), emoji_clip) == {"happy dog"}
    pieces = Vocabulary(whole_words=False)
    both = (pieces & Vocabulary(block=["dog"], whole_words=False)).lexicon(emoji_clip)
    assert len(both.phrases) > 49000
    assert len((pieces & Vocabulary(block=["dog"])).lexicon(emoji_clip).phrases) < 40000


def test_phrases_of_combined_rules_stay_whole(emoji_clip):
    bank, ascii_only = Vocabulary(only=["red car", "blue"]), Vocabulary(ascii_only=True)
    assert phrases((bank - Vocabulary(only=["green"])) & ascii_only, emoji_clip) == {
        "red car",
        "blue",
    }
    either = bank | Vocabulary(only=["happy dog"])
    assert phrases(either & ascii_only, emoji_clip) == {"red car", "blue", "happy dog"}


def test_taking_away_what_is_not_there_changes_nothing(emoji_clip):
    pets = Vocabulary(only=["cat", "dog"])
    assert phrases(pets - Vocabulary(only=["qzxjvvbk"]), emoji_clip) == {"cat", "dog"}
    assert phrases(pets | Vocabulary(only=["qzxjvvbk"]), emoji_clip) == {"cat", "dog"}
    assert phrases(Vocabulary() - Vocabulary(block=["cat"]), emoji_clip) == {"cat"}


def test_marks_can_be_blocked(emoji_clip):
    left = phrases(Vocabulary(block=[",", "("], whole_words=False), emoji_clip)
    assert not any("," in text or "(" in text for text in left)


def test_marks_of_a_list_that_is_taken_away_are_blocked(all_tokens):
    """Not only the token of the mark itself."""
    rest = Vocabulary(whole_words=False) - Vocabulary(only=["!"])
    left = phrases(rest, all_tokens)
    assert not any("!" in text for text in left) and any("?" in text for text in left)


def test_a_phrase_has_to_fit_the_context(all_tokens):
    fits, longer = (" ".join(["cat"] * count) for count in (75, 76))
    assert phrases(Vocabulary(only=[fits, longer]), all_tokens) == {fits}


def test_the_words_of_the_dictionary_are_those_of_each_clip(all_tokens, tiny_clip):
    first, second = phrases(Vocabulary(), all_tokens), phrases(Vocabulary(), tiny_clip)
    assert second < first and phrases(Vocabulary(), all_tokens) == first
    assert all(word == "," or word.lower() in english_words() for word in first)


def test_hashtags_are_phrases_and_comments_are_not(tmp_path):
    (tmp_path / "bank.txt").write_text("# a comment\n#\n#portrait\ncat\n")
    assert Vocabulary(only=tmp_path / "bank.txt").only == ("#portrait", "cat")


@pytest.mark.slow
def test_pieces_of_words_beside_a_bank(emoji_clip):
    rules = Vocabulary(only=["red car"]) | Vocabulary(whole_words=False)
    (result,) = invert(emoji_clip, EXAMPLES[0], paper(10, prompt_len=6, vocabulary=rules))
    assert emoji_clip.tokenizer.encode(result.prompt) == result.token_ids


def test_blocking_alone_adds_no_word(emoji_clip):
    """A rule that only blocks does not bring in words that the CLIP was not trained on."""
    rule = Vocabulary(block=["fish"], whole_words=False)
    expected = phrases(Vocabulary(block=["fish"]), emoji_clip)
    assert phrases(Vocabulary() & rule, emoji_clip) == expected
    assert phrases(rule & Vocabulary(), emoji_clip) == expected


def test_rules_that_read_the_weights_follow_them():
    """Also within others; everything else is kept until another vocabulary comes."""
    clip = make_clip(seed=4)
    strong = Vocabulary(min_embedding_std=0.01, dictionary=False)
    for rules in (strong, strong & Vocabulary(ascii_only=True), strong - Vocabulary(only=["cat"])):
        token = max(rules.lexicon(clip).phrases)
        with torch.no_grad():
            clip.text.token_embedding[token] *= 0.001
        assert token not in rules.lexicon(clip).phrases

    words, ascii_words = Vocabulary(dictionary=False), Vocabulary(dictionary=False, ascii_only=True)
    assert words.lexicon(clip) is words.lexicon(clip)
    assert ascii_words.lexicon(clip) != words.lexicon(clip)
