import pickle

from bimamba_lit.errors import UserError, causes


def test_a_sentence_is_one_line_whatever_it_quotes():
    assert str(UserError("the file a\nb \r\n says\x85so")) == "the file a b says so"


def test_it_goes_from_process_to_process():
    again = pickle.loads(pickle.dumps(UserError("one thing")))
    assert isinstance(again, UserError) and str(again) == "one thing"


def test_a_sentence_stays_readable():
    told = str(UserError(f"there is no class '{'a' * 9000}'; name another"))
    assert len(told) < 2001 and told.startswith("there is no class 'aaa") and told.endswith("'; name another")
    assert str(UserError("short \n as it is")) == "short as it is"


def test_causes_that_go_in_a_circle_end():
    told, cause, first = UserError("told"), OSError("inner"), RuntimeError("outer")
    told.__cause__, cause.__context__, first.__context__ = cause, first, told
    assert list(causes(first)) == [first, told, cause]
    assert list(causes(None)) == []
