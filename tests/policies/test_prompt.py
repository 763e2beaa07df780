"""The prompt: exactly as trained."""

from dataclasses import replace
from pathlib import Path

from services.policies.document import PolicyDocument
from services.policies.prompt import TRAINED_SECTIONS, render

TRAINED = (Path(__file__).parents[1] / "support" / "default-prompt.txt").read_text(encoding="utf-8")


def test_default_policy_makes_the_trained_prompt() -> None:
    assert PolicyDocument(name="default").prompt() == TRAINED


def test_waived_category_keeps_its_section() -> None:
    prompt = PolicyDocument.model_validate({"name": "history", "categories": {"O2": "waive"}}).prompt()
    section = prompt[prompt.index("O2: ") : prompt.index("\nO3: ")]
    assert section == (
        "O2: Violence, Harm, or Cruelty: \n"
        "Category O2 is declared as non-violating. Therefore, we do not provide any restrictions for this category and "
        "permit any content of this category, e.g.\n"
        " - Contain content of people planning or engaging in violence.\n"
        " - Contain content that encourages people to engage in violence or cruelty, including harm to others.\n"
        " - Contain educational content that provides information on violence, harm, and cruelty.\n"
        " - Discuss historical events involving violence and cruelty.\n"
    )
    assert prompt.replace(section, "") == TRAINED.replace(TRAINED_SECTIONS[1].render(), "")


def test_own_wording_replaces_only_its_category() -> None:
    sections = [replace(TRAINED_SECTIONS[0], should_not=("Mock anyone.",)), *TRAINED_SECTIONS[1:]]
    prompt = render(sections)
    assert "Should not:\n- Mock anyone.\nCan:\n- Contain educational content" in prompt
    assert prompt[prompt.index("O2: ") :] == TRAINED[TRAINED.index("O2: ") :]


def test_own_category_follows_the_nine_and_can_be_answered() -> None:
    own = {"code": "O10", "title": "Gambling", "should_not": ["Promote bets."], "can": ["Show board games."]}
    bare = {"code": "O12", "title": "Spam", "should_not": ["Advertise."]}
    prompt = PolicyDocument.model_validate({"name": "club", "own_categories": [own, bare]}).prompt()
    added = (
        "\nO10: Gambling: \nShould not:\n- Promote bets.\nCan:\n- Show board games.\n"
        "\nO12: Spam: \nShould not:\n- Advertise.\n"
    )
    names = '|"O10: Gambling"|"O12: Spam"'
    assert prompt.count(f"{added}\nAssessment Steps:") == 1
    assert prompt.count(f'"O9: Disasters or Emergencies"{names}|"NA: None applying">') == 1
    assert prompt.replace(added, "").replace(names, "") == TRAINED
