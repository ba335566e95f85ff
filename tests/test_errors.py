import pickle

from bimamba_lit.errors import UserError


def test_a_sentence_is_one_line_whatever_it_quotes():
    assert str(UserError("the file a\nb \r\n says\x85so")) == "the file a b says so"


def test_it_goes_from_process_to_process():
    again = pickle.loads(pickle.dumps(UserError("one thing")))
    assert isinstance(again, UserError) and str(again) == "one thing"
