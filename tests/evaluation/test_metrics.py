"""Figures of predictions against cases that can be computed by hand."""

from __future__ import annotations

import math

import pytest

from evaluation import metrics


def test_figures_equal_a_case_computed_by_hand() -> None:
    import numpy as np

    truth = ["0", "0", "0", "0", "1", "1", "1", "1"]
    p = np.array([0.1, 0.2, 0.3, 0.7, 0.4, 0.6, 0.8, 0.9])
    found = metrics.classification(truth, np.stack([1 - p, p], 1), ("0", "1"))
    assert found["confusion"] == [[3, 1], [1, 3]]
    assert found["accuracy"] == found["precision"] == found["recall"] == found["f1"] == 0.75
    assert found["roc_auc"] == pytest.approx(14 / 16)  # of 16 pairs, 0.4 and 0.6 stand below 0.7
    assert found["tpr_at_fpr_10"] == 0.5
    assert found["brier"] == pytest.approx(float(np.mean((p - np.array([0] * 4 + [1] * 4)) ** 2)))
    assert found["accuracy_interval"] == pytest.approx([0.409, 0.929], abs=1e-3)  # Wilson's, of 6 in 8
    low, high = found["roc_auc_interval"]
    assert low < 14 / 16 < high <= 1


def test_more_than_two_labels_and_a_label_that_does_not_occur() -> None:
    import numpy as np

    found = metrics.classification(["a", "b", "c", "a"], np.eye(3)[[0, 1, 2, 1]] * 0.7 + 0.1, ("a", "b", "c"))
    assert found["accuracy"] == 0.75 and found["roc_auc"] is not None
    curves = found["curves"]  # of 4 right labels 3 are held for 0.8, of 8 wrong ones 1, all others for 0.1
    assert curves["micro"] and curves["auc"] == pytest.approx((3 * 7 + (3 + 7) / 2) / (4 * 8))
    lacking = metrics.classification(["a", "a"], np.array([[0.9, 0.1], [0.2, 0.8]]), ("a", "b"))
    assert lacking["roc_auc"] is None and lacking["accuracy"] == 0.5 and lacking["curves"] is None


@pytest.mark.parametrize("labels", [2, 3])
def test_figures_are_those_of_scikit_learn(labels: int) -> None:
    import numpy as np
    from sklearn import metrics as sk

    random = np.random.default_rng(labels)
    y, p = random.integers(0, labels, 200), random.multinomial(8, [1 / labels] * labels, 200) / 8  # with many ties
    found = metrics.classification([str(label) for label in y], p, [str(label) for label in range(labels)])
    score, one_hot = (p[:, 1], y) if labels == 2 else (p, np.eye(labels)[y])
    average = "binary" if labels == 2 else "macro"
    assert found["f1"] == pytest.approx(sk.f1_score(y, p.argmax(1), average=average), abs=1e-12)
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, p.argmax(1)), abs=1e-12)
    assert found["roc_auc"] == pytest.approx(sk.roc_auc_score(y, score, multi_class="ovr"), abs=1e-12)
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(one_hot, score), abs=1e-12)
    assert found["confusion"] == sk.confusion_matrix(y, p.argmax(1)).tolist()


def test_majority_vote_is_the_trained_rows_majority() -> None:
    shares = metrics.majority(["1", "1", "0"], ["0", "0"], ("0", "1"))
    assert shares.tolist() == [pytest.approx([1 / 3, 2 / 3])] * 2


def test_mcnemar_and_the_difference_of_two() -> None:
    pair = metrics.paired(["1"] * 10, ["0"] * 6 + ["1"] * 4, ["1"] * 10)
    assert (pair["difference"], pair["only_first_right"], pair["only_second_right"]) == (0.6, 0, 6)
    assert pair["mcnemar_p"] == pytest.approx(2 * 0.5**6)


def test_texts_are_compared_in_chinese_words() -> None:
    same = metrics.texts(["我爱北京天安门", "a b"], ["我爱北京天安门", "a b"])
    assert same["exact_match"] == 1 and same["rougeL"] == 1 and same["chrf"] == pytest.approx(100)
    near = metrics.texts(["我爱上海"], ["我爱北京"])
    assert near["exact_match"] == 0 and 0 < near["rouge1"] < 1
    loss = metrics.perplexity([(10.0, 10), (0.0, 30)])
    assert loss["loss"] == 0.25 and loss["perplexity"] == pytest.approx(math.exp(0.25))  # by tokens, not by rows
