# ruff: noqa: E501  # the grammar has one rule a line
"""Draw open English text, in addition to the sentence patterns of `training/data/sources/sentences.py`.

There are two sources: WordNet's example sentences and glosses, cleaned to speakable lines, and a small grammar. The
grammar covers everyday talk, numbers, dates, times, money and names. A hash of its words gives the split of a line, so
no training clip contains a held-out line. This module depends on no audio, voice or scene.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

from training.data.sources.downloads import MissingDataError
from training.data.sources.sentences import SLOTS
from training.data.sources.spelled_numbers import spell_number, spell_ordinal, spell_year

Split = Literal["train", "validation", "test"]

MIN_WORDS, MAX_WORDS = 3, 14
_VALIDATION_PERCENT, _TEST_PERCENT = 2, 4
_MIN_OCCURRENCES = 2
"""Words with a single occurrence in all of WordNet are excluded as Latin names or misprints."""

# Sources of drawn lines: examples give talk, glosses give words, the grammar gives numbers and names.
_SOURCES, _WEIGHTS = ("examples", "glosses", "grammar"), (48, 17, 35)

# Excluded: synsets marked by WordNet itself, and unwanted words.
_MARKED = re.compile(r"\b(offensive|obscene|slur|vulgar|disparag\w*|derogatory|sexual\w*|genital\w*|taboo)\b")
_UNWANTED = re.compile(
    r"\b(rap(e[ds]?|ing|ists?)|fuck\w*|shit\w*|whor\w*|bitch\w*|sluts?|nigg\w*|naked|penis|vagina\w*|breasts?|sex\w*|nazis?|"
    r"prostitut\w*|genocid\w*|suicid\w*|lynch\w*|tortur\w*|murder\w*|jews?|jewish|negro\w*|masturbat\w*|erotic\w*|porn\w*)\b",
    re.IGNORECASE,
)


def _spell_token(match: re.Match[str]) -> str:
    digits, suffix = match[1], match[2].lower()
    number = int(digits)
    if suffix in ("st", "nd", "rd", "th"):
        return spell_ordinal(number)
    if suffix == "s":  # "in the 1980s"
        words = spell_year(number) if number >= 1100 else spell_number(number)
        return words[:-1] + "ies" if words.endswith("y") else words + "s"
    if suffix or number >= 1_000_000:
        return "#"  # Not speakable in this form; `clean` refuses the sign.
    return spell_year(number) if len(digits) == 4 and 1100 <= number < 2100 else spell_number(number)


def clean(text: str) -> str | None:
    """Convert a sentence to a line of words with letters and apostrophes only, or None if this would lose words."""
    text = re.sub(r"\([^)]*\)", " ", text).replace("`", "'").strip().rstrip(".?!,;: ")
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    if re.search(r"\d[.:/]\d", text):
        return None
    text = re.sub(r"\b(\d{1,7})([A-Za-z]*)\b", _spell_token, re.sub(r"[,\-]", " ", text))
    text = " ".join(text.split())
    if not re.fullmatch(r"[A-Za-z]+('[A-Za-z]+)?(s')?( [A-Za-z]+('[A-Za-z]+)?(s')?)*", text) or _UNWANTED.search(text):
        return None
    words = text.split()
    if not MIN_WORDS <= len(words) <= MAX_WORDS or max(map(len, words)) > 16:
        return None
    # Synthesizers disagree about the pronunciation of initials and symbols ("H", "cm").
    if any(len(word) == 1 and word not in ("a", "A", "I", "O") for word in words):
        return None
    if any(len(word) > 1 and word.isupper() for word in words):
        return None
    return text


def split_of(text: str) -> Split:
    """Return the split of a line by its words alone, ignoring case."""
    digest = hashlib.sha256(" ".join(text.lower().split()).encode()).digest()
    place = int.from_bytes(digest[:4], "little") % 100
    if place < _VALIDATION_PERCENT:
        return "validation"
    return "test" if place < _VALIDATION_PERCENT + _TEST_PERCENT else "train"


def _lower_first(lines: list[str]) -> list[str]:
    """Convert the first word of a line to its form inside lines: "the" instead of "The", but "London"."""
    inside: Counter[str] = Counter(word for line in lines for word in line.split()[1:])
    lowered: list[str] = []
    for line in lines:
        first, rest = line.split(" ", 1)
        if first[0].isupper() and first != "I" and not first.startswith("I'"):
            plain = first[0].lower() + first[1:]
            first = plain if inside[plain] >= inside[first] and inside[plain] else first
        lowered.append(f"{first} {rest}")
    return lowered


@lru_cache(maxsize=2)
def _wordnet(folder: Path) -> dict[tuple[str, Split], tuple[str, ...]]:
    """Read WordNet's data files: (source, split) -> lines, sorted and without duplicates."""
    raw: dict[str, list[str]] = {"examples": [], "glosses": []}
    for part in ("noun", "verb", "adj", "adv"):
        path = folder / f"data.{part}"
        if not path.exists():
            raise MissingDataError(f"{path} is missing: fetch the assets first (make bank)")
        for row in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if row.startswith("  ") or "|" not in row:
                continue  # The licence.
            gloss = row.split("|", 1)[1].strip()
            if _MARKED.search(gloss):
                continue
            raw["examples"] += re.findall(r'"([^"]+)"', gloss)
            raw["glosses"].append(re.sub(r'"[^"]*"?', "", gloss).split(";")[0])
    cleaned = {source: [line for line in map(clean, texts) if line] for source, texts in raw.items()}
    lines = _lower_first(cleaned["examples"] + cleaned["glosses"])
    count = len(cleaned["examples"])
    cleaned = {"examples": lines[:count], "glosses": lines[count:]}
    words: Counter[str] = Counter(word for line in lines for word in line.lower().split())
    found: dict[tuple[str, Split], list[str]] = {}
    seen: set[str] = set()
    for source, texts in cleaned.items():
        for line in sorted(texts):
            key = line.lower()
            if key in seen or any(words[word] < _MIN_OCCURRENCES for word in key.split()):
                continue
            seen.add(key)
            found.setdefault((source, split_of(line)), []).append(line)
    return {key: tuple(texts) for key, texts in found.items()}


_GRAMMAR: dict[str, str] = {
    "line": "<talk>|<talk>|<talk>|<ask>|<ask>|<request>|<request>|<reply>|<story>|<story>|<figures>|<figures>|<figures>|<odd>|<odd>",
    # Statements about people and plans.
    "talk": "<who> <does> <time>|<who> <did> <when>|<name> <surname> <did> <when>|I <think> <who> <does>|<who> <willdo> <future>|<who> <willdo> if <who> <does>"
    "|<name> told me that <who> <did>|<it> <isadj>|<it> <isadj> and <it> <isadj>|the <noun> in the <room> <isadj>|my <kin> <did> <when>|<who> <did> because <it> <wasadj>"
    "|<name> and <name> <didpl> <when>|there <were> <count> <nouns> on the <surface>|<who> never <did>|I have not seen <name> since <day>|we are out of <food> and <food>"
    "|nobody in <city> <did> <when>|<name> says <who> <willdo> <future>|I am <mood> because <who> <did>|this <noun> belongs to <name> <surname>",
    "story": "when <who> <did> the <noun> <wasadj>|after <event> <who> <did>|before <event> we <didpl>|the <adj> <noun> <happened> <when>|a <adj> <adj2> <noun> stood beside the <place>"
    "|an old <job> from <city> <did>|the <job> and the <job> <didpl>|two <nouns> <happened> near the <place>|once upon a time a <job> <did>|during <event> <name> <did>"
    "|as soon as <who> <did> <who> <did>|the <animal> ran across the <place> and <happened>|it was <adj> in the <room> but <adj2> in the <place>",
    "ask": "<wh> <aux> <whobase> <dobase> <time>|<aux> <whobase> <dobase> <time>|have you ever been to <city>|where did <name> put the <adj> <noun>|how many <nouns> are on the <surface>"
    "|what time does the <place> close <when2>|why is the <noun> so <adj>|who took the <noun> from the <surface>|is there any <food> left in the <room>|do you remember <name> <surname>"
    "|could you tell me the way to the <place>|which <noun> did the <job> choose|have you heard from <name> <when2>|are we still meeting at the <place> <future>"
    "|how long does it take to get to <city>|what happened to the <adj> <noun>|when will <name> be back from <city>|did anyone feed the <animal> <when2>",
    "request": "please <dobase> <future>|could you please <dobase>|do not <dobase> <future>|let us <dobase> <future>|remember to <dobase> before <event>|tell <name> to <dobase>"
    "|put the <noun> on the <surface>|bring me the <adj> <noun> from the <room>|take the <adj> <noun> to the <place>|be careful with that <adj> <noun>|wait for me at the <place>"
    "|give the <noun> back to <name>|turn off the <noun> in the <room>|ask the <job> about the <noun>|call <name> <surname> at the <place>|never mind the <noun> just <dobase>",
    "reply": "yes I <dobase> <time>|no I do not <dobase> <time>|that is <adverb> <adj>|well that depends on the <noun>|I am sorry but <who> <did>|of course you can <dobase>|maybe we should <dobase>"
    "|not until <event> is over|I would rather <dobase> than <dobase>|that was <adverb> <adj> of <name>|all right then I <willdo>|you are right about the <noun>|I have no idea why <who> <did>"
    "|sure I can <dobase> <future>|honestly I did not expect the <noun>|thanks for the <adj> <noun> <name>|good luck with the <noun> <future>",
    # Numbers in all their forms, rare in WordNet.
    "figures": "my number is <digits>|the code is <digits4>|it costs <money>|that will be <money> please|I paid <money> for the <noun>|the <vehicle> leaves at <clock>|wake me up at <clock>"
    "|meet me at <clock> on <day>|my birthday is on <date>|she was born on <date> in <year>|the war ended in <year>|in <year> he moved to <city>|turn to page <number>"
    "|room <number> is on the <ordinal> floor|the flight number is <digits4>|there are <bignumber> people in <city>|it is <number> degrees in <city> today|about <percent> percent of the <nouns> <happened>"
    "|he ran <number> miles in <number> minutes|the <ordinal> <noun> on the left <isadj>|add <number> grams of <food>|<number> plus <number> is <number>|my address is <number> <surname> street"
    "|the score was <small> to <small>|this is the <ordinal> time <who> <did>|we sold <bignumber> <nouns> in <month>|the meeting on <date> starts at <clock>|her office is number <number> on <surname> road",
    # Unlikely word combinations from the slots of the question patterns; only the audio gives a clue.
    "odd": "<adj> <nouns> <didpl>|<noun> <noun> <noun>|the <color> <animal> and the <color> <noun>|<adj> <noun> <adj2> <animal>|<food> <food> and <food>|<name> <name> and <name>"
    "|<name> <surname> from <city>|<city> <city> and <city>|every <noun> needs a <adj> <noun>|no <animal> likes a <adj> <noun>|the <job> of <city> <did>|<count> <adj> <nouns> and a <noun>"
    "|<day> <day> and <day>|<month> the <ordinal>|<adverb> the <noun> <happened>|between the <noun> and the <noun>|under the <adj> <surface> by the <place>|with a <noun> in each hand",
    "who": "I|you|we|they|he|she|<name>|<name>|<name>|my <kin>|the <job>|our neighbor|everyone|someone|her <kin>|his <kin>",
    "whobase": "you|we|they|I|the children|your friends",
    "does": "can help you|might be late|should know better|must leave early|would like some <food>|will call you|could use a <noun>|may need a new <noun>|cannot find the <noun>|will not eat <food>|has to work|should see a <job>",
    "did": "bought a <adj> <noun>|lost the <noun>|went to <city>|went to the <place>|fixed the <adj> <noun>|forgot the <noun>|made some <food>|saw a <adj> <animal>|met <name> at the <place>|left the <noun> on the <surface>"
    "|painted the <room> <color>|found <money>|talked about the <noun>|wrote a letter to <name>|broke the <adj> <noun>|came home early|slept until noon|took the <vehicle>|sold the <vehicle>|called the <job>|ate <food> with <food>"
    "|read a book about <nouns>|opened the <noun>|walked through the <place>|carried a <noun>|learned to cook <food>|hid behind the <noun>|fell asleep in the <room>|gave <name> a <noun>|cleaned the whole <room>|lived in <city>",
    "didpl": "bought <count> <nouns>|lost their <nouns>|went to <city> together|fixed the <noun>|shared some <food>|saw <count> <animal>s|met at the <place>|painted the <room>|argued about the <noun>|took the same <vehicle>|danced all night|waited outside the <place>",
    "willdo": "will <dobase>|will probably <dobase>|am going to <dobase>|might <dobase>|would <dobase>",
    "dobase": "buy a <adj> <noun>|look for the <noun>|go to <city>|go to the <place>|fix the <noun>|cook some <food>|visit <name>|feed the <animal>|clean the <room>|take the <vehicle>|call the <job>|open the <noun>|sell the <vehicle>"
    "|talk to <name>|wait for the <vehicle>|play <sport>|study <subject>|wash the <noun>|borrow a <noun>|paint the <room> <color>|drink some <drink>|sit by the window|stay at home|write everything down|pay <money>|lock the door|bring the <noun>"
    "|try the <food>|sleep on the sofa|turn around|be quiet|speak more slowly|start over again|leave at <clock>",
    "think": "think|believe|suppose|hope|guess|heard that|wonder whether|am sure that|doubt that",
    "aux": "do|did|can|should|could|would|will",
    "wh": "when|where|why|how|how often",
    "it": "it|this|that|the <noun>|the <adj> <noun>|her <noun>|his <noun>|my <noun>|the whole <event2>",
    "isadj": "is <adj>|is too <adj>|is <adverb> <adj>|looks <adj>|was <adj>|seems <adj>|is not <adj>|became <adj>|has always been <adj>",
    "wasadj": "was <adj>|was too <adj>|was not <adj>|looked <adj>|was <adverb> <adj>",
    "were": "were|are|used to be|should be",
    "happened": "disappeared|fell over|broke down|arrived late|made a noise|turned <color>|caught fire|stopped working|got lost|came back|grew larger|was sold|were stolen",
    "event": "the party|the wedding|the meeting|lunch|dinner|breakfast|the storm|the concert|the game|the war|school|the lecture|his birthday|the holidays|the exam|the accident|the election",
    "event2": "evening|week|story|plan|journey|building|weekend|conversation",
    "time": "today|tomorrow|now|later|soon|again|every day|on <day>|in <month>|at <clock>|tonight|on <day> morning|right away|sometimes|after <event>",
    "future": "tomorrow|tonight|on <day>|next week|in <month>|at <clock>|soon|later|before <event>|after <event>|in <number> minutes|this afternoon",
    "when": "yesterday|last night|last week|in <month>|on <day>|in <year>|<count> years ago|this morning|a long time ago|on <date>|during <event>|after <event>|at <clock>",
    "when2": "today|lately|this week|tonight|yet|this morning",
    "room": "kitchen|bedroom|bathroom|attic|basement|garage|hallway|office|garden|classroom|dining room|living room",
    "surface": "table|shelf|floor|desk|chair|counter|bench|roof|window sill|wall|bed|carpet|stairs",
    "drink": "water|tea|coffee|milk|juice|lemonade|wine|beer|cider|cocoa",
    "kin": "mother|father|sister|brother|aunt|uncle|cousin|grandmother|grandfather|daughter|son|wife|husband|boss|roommate|best friend|niece|nephew",
    "adverb": "very|quite|rather|really|almost|surprisingly|extremely|unusually|terribly|fairly|slightly|completely",
    "surname": "Smith|Johnson|Williams|Brown|Jones|Miller|Davis|Wilson|Anderson|Taylor|Moore|Jackson|Harris|Clark|Lewis|Robinson|Walker|Young|Allen|King|Wright|Scott|Hill|Green|Adams|Baker|Nelson|Carter|Mitchell|Turner|Parker"
    "|Collins|Edwards|Stewart|Morris|Murphy|Cook|Rogers|Morgan|Cooper|Peterson|Reed|Bailey|Bell|Kelly|Howard|Ward|Cox|Richardson|Watson|Brooks|Wood|Bennett|Gray|Hughes|Price|Myers|Long|Foster|Sanders|Ross|Powell|Sullivan|Russell"
    "|Fisher|Henderson|Graham|Reynolds|Griffin|Wallace|West|Cole|Hayes|Bryant|Gibson|Ford|Ellis|Stone|Webb|Chapman|Hunt|Warren|Mason|Crawford|Boyd|Kennedy|Burns|Gordon|Shaw|Holmes|Rice|Black|Palmer|Mills|Knight|Ferguson|Dunn|Garcia|Lopez|Nguyen|Kim|Singh|Rossi|Schmidt|Novak|Larsen|Tanaka",
    "name": "@name|@name|James|Robert|John|Michael|William|Richard|Joseph|Charles|Christopher|Matthew|Anthony|Steven|Andrew|Kenneth|Joshua|Brian|Edward|Ronald|Timothy|Jason|Jeffrey|Ryan|Jacob|Gary|Nicholas|Jonathan|Stephen|Larry|Justin"
    "|Brandon|Benjamin|Samuel|Gregory|Patrick|Alexander|Dennis|Jerry|Tyler|Aaron|Jose|Nathan|Douglas|Zachary|Kyle|Mary|Patricia|Jennifer|Linda|Elizabeth|Barbara|Susan|Jessica|Karen|Nancy|Lisa|Betty|Margaret|Sandra|Ashley|Kimberly|Emily|Donna"
    "|Michelle|Carol|Amanda|Dorothy|Melissa|Deborah|Stephanie|Rebecca|Sharon|Cynthia|Kathleen|Amy|Angela|Shirley|Brenda|Pamela|Nicole|Samantha|Katherine|Christine|Debra|Catherine|Carolyn|Janet|Ruth|Heather|Virginia|Judith|Joan|Evelyn|Lauren|Megan"
    "|Andrea|Cheryl|Jacqueline|Martha|Gloria|Teresa|Ann|Sara|Madison|Frances|Kathryn|Janice|Jean|Abigail|Sophia|Judy|Natalie|Charlotte|Amber|Brittany|Beverly|Theresa|Marie|Denise|Danielle|Grace|Ahmed|Fatima|Chen|Yuki|Priya|Omar|Ingrid|Pedro|Olga",
    "city": "@city|@city|New York|Los Angeles|San Francisco|Philadelphia|San Diego|Austin|Detroit|Memphis|Portland|Las Vegas|Baltimore|Milwaukee|Sacramento|Kansas City|Cleveland|Minneapolis|New Orleans|Tampa|Honolulu|Pittsburgh|Cincinnati|Saint Louis"
    "|Birmingham|Manchester|Liverpool|Glasgow|Edinburgh|Bristol|Leeds|Cardiff|Belfast|Barcelona|Munich|Hamburg|Milan|Naples|Venice|Warsaw|Budapest|Stockholm|Copenhagen|Helsinki|Amsterdam|Istanbul|Beijing|Shanghai|Singapore|Bangkok|Seoul|Delhi|Jakarta"
    "|Melbourne|Auckland|Vancouver|Montreal|Mexico City|Havana|Lima|Santiago|Nairobi|Lagos|Cape Town|Jerusalem|Dubai|Alaska|Texas|California|Florida|Canada|France|Germany|Italy|Spain|Ireland|Scotland|Japan|China|India|Russia|Brazil|Egypt|Greece|Norway",
    "noun": "@object|@object|@object|apple|arm|army|arrow|art|baby|ball|balloon|band|bank|barrel|bath|battery|beard|bell|belt|bill|bird|board|boat|bone|boot|border|branch|bread|brick|button|cabin|cable|cage|candle|cap|card|carpet|case|cave|ceiling|chain|cheese|child"
    "|church|circle|clay|cliff|cloud|club|coal|coin|collar|comb|contract|copy|corner|cotton|couch|crown|curtain|deal|debt|dinner|dirt|doll|door|dream|dress|drum|dust|ear|earth|engine|eye|face|fan|farm|feather|fence|field|file|film|flag|flame|flood|flower|fork"
    "|frame|fruit|game|gate|ghost|gift|glass|glove|gold|grass|hair|hall|hand|handle|heart|heat|hill|hole|hook|horn|house|ice|idea|ink|iron|jar|job|joke|judge|kiss|lake|land|law|leaf|leather|leg|lesson|lever|light|line|list|lock|love|machine|magnet|mask|match|meal"
    "|meat|medal|message|metal|mistake|money|moon|motor|mouth|movie|mud|muscle|nail|name|neck|needle|nest|net|noise|nose|note|nut|oil|oven|page|paint|pan|paper|parcel|party|path|peace|pen|piano|pipe|plan|planet|plant|pocket|poem|poison|pole|pool|pot|powder|prize"
    "|problem|promise|pump|puzzle|question|rain|reason|record|report|rice|river|road|rock|roof|root|rule|sail|salt|sand|scale|screw|sea|seat|secret|seed|shade|shadow|shelf|shell|ship|shoe|shop|sign|silk|skin|skirt|sky|smile|smoke|snow|soap|sock|soil|song|sound|soup"
    "|spade|spark|spoon|spring|stamp|star|steam|steel|stick|stone|story|storm|street|string|sugar|summer|sun|surprise|sword|tail|tank|tape|target|tax|thread|throat|thumb|tin|toe|tongue|tool|tooth|town|toy|track|trade|tray|treasure|tree|trick|truth|tube|turn|uniform|valley"
    "|vase|vegetable|veil|voice|vote|wagon|wall|waste|water|wave|wax|weapon|weight|wheel|whip|whistle|wind|window|wine|wing|winter|wire|wood|wool|word|worm|yard|zipper",
    "nouns": "@objects|@objects|apples|arrows|babies|balls|birds|bones|books|boots|branches|bricks|buttons|cards|cars|chairs|children|coins|cookies|doctors|doors|dreams|eyes|farmers|feathers|fields|flags|flowers|friends|games|gifts|girls|boys|hands|hills|horses|houses|ideas|islands"
    "|jobs|keys|leaves|legs|letters|lights|lines|machines|maps|matches|men|women|mistakes|mountains|names|nights|numbers|pages|people|pictures|planes|plants|plates|potatoes|prices|problems|questions|rivers|roads|rocks|rooms|rules|schools|seeds|sheep|shoes|shops|signs|songs|stars"
    "|stones|stories|streets|students|teachers|teeth|tickets|tools|towns|toys|trains|trees|voices|walls|waves|weeks|windows|words|workers|years",
    "adj": "@quality|@quality|able|afraid|angry|awful|bad|bare|bitter|blind|blunt|bold|boring|brave|brief|broad|brown|busy|calm|careful|careless|certain|charming|chief|clever|cold|common|complete|complex|cool|correct|cruel|curious|curly|damp|dark|dead|deaf|dear|deep|delicate|delicious"
    "|different|difficult|double|dry|dull|eager|early|easy|elegant|enormous|equal|exact|false|famous|fancy|fast|fat|fierce|final|fine|firm|flat|foolish|formal|fragile|free|frequent|fresh|friendly|full|funny|gentle|gloomy|good|grateful|great|greedy|guilty|happy|hard|harsh|healthy"
    "|helpful|high|hollow|honest|hot|hungry|ill|important|innocent|jealous|keen|kind|large|late|lazy|light|little|lively|long|loose|loud|lovely|low|lucky|mad|main|mild|mysterious|nasty|natural|neat|necessary|nervous|new|nice|noble|normal|noisy|odd|old|open|ordinary|pale|patient|plain"
    "|pleasant|polite|poor|popular|powerful|pretty|private|proper|public|pure|quick|rare|raw|ready|real|recent|regular|rich|ripe|rough|round|royal|rude|rusty|sad|safe|salty|serious|sharp|shiny|short|shy|sick|silent|silly|simple|slippery|slow|small|smart|smooth|soft|solid|sore|sour"
    "|special|splendid|square|stale|steady|steep|sticky|stiff|straight|strong|stubborn|sudden|sweet|swift|tall|tame|tender|terrible|thick|thin|tight|tough|ugly|unusual|upset|urgent|usual|vague|valuable|various|violent|warm|weak|wealthy|wet|whole|wicked|wide|wild|wise|wooden|worried|wrong|young",
    "adj2": "<adj>",
    "mood": "@mood",
    "food": "@food|@food|@food|almonds|asparagus|bacon|barley|basil|berries|biscuits|broccoli|cabbage|celery|cereal|cherries|cinnamon|corn|crab|cucumber|curry|dumplings|figs|ginger|ham|jam|lamb|lettuce|lobster|mango|melon|mustard|oats|omelets|parsley|pie|pork|pudding|pumpkin|raisins|salmon|sandwiches|shrimp|steak|syrup|toast|tofu|tuna|turkey|vanilla|vinegar|walnuts|wheat|yams|zucchini",
    "animal": "@animal|@animal|ant|bat|beetle|bull|butterfly|calf|chicken|crab|crocodile|crow|deer|eagle|giraffe|goose|hamster|hawk|hedgehog|kangaroo|kitten|lamb|leopard|lizard|moth|otter|panda|peacock|penguin|pig|puppy|raccoon|raven|seal|shark|snail|sparrow|squirrel|swan|toad|turkey|whale|zebra",
    "job": "@job|@job|architect|artist|astronaut|author|banker|barber|captain|cashier|chef|clerk|coach|cook|dancer|detective|editor|firefighter|fisherman|florist|gardener|guard|hunter|inspector|janitor|journalist|judge|magician|mayor|miner|musician|officer|photographer|physicist|poet|policeman|politician|porter|priest|professor|queen|reporter|sailor|secretary|senator|shepherd|shoemaker|soldier|surgeon|translator|veterinarian",
    "place": "@place|@place|academy|alley|arena|avenue|barn|bay|border|canal|cathedral|cemetery|chapel|clinic|college|corner store|courthouse|desert|dock|factory|fountain|gallery|gym|highway|hill|jungle|laboratory|lighthouse|meadow|mill|monument|nursery|observatory|orchard|palace|parking lot|playground|pond|post office|prison|railway|ruins|shore|stable|swamp|temple|town hall|university|vineyard|volcano|waterfall|zoo",
    "vehicle": "@vehicle",
    "sport": "@sport",
    "subject": "@subject",
    "color": "@color",
    "day": "@day",
    "month": "@month",
}
"""Symbol -> alternatives. `<x>` is another symbol, `@x` a slot of the question patterns; all else is spoken text."""

_SYMBOL = re.compile(r"<([a-z0-9]+)>|@([a-z]+)")
_ALTERNATIVES = {symbol: tuple(rule.split("|")) for symbol, rule in _GRAMMAR.items()}


def _clock(rng: random.Random) -> str:
    hour = rng.randrange(1, 13)
    minute = rng.choice((0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, rng.randrange(1, 60)))
    kind = rng.randrange(4)
    if kind == 0 or minute == 0:
        return f"{spell_number(hour)} {rng.choice(('sharp', 'in the morning', 'in the evening'))}"
    if kind == 1 and minute % 15 == 0:
        return (
            f"{'half past' if minute == 30 else 'quarter to' if minute == 45 else 'quarter past'} {spell_number(hour)}"
        )
    if kind == 2:
        before = minute > 30
        return f"{spell_number(60 - minute if before else minute)} {'to' if before else 'past'} {spell_number(hour)}"
    return f"{spell_number(hour)} {'oh ' if minute < 10 else ''}{spell_number(minute)}"


def _money(rng: random.Random) -> str:
    whole = rng.choice(
        (rng.randrange(2, 20), rng.randrange(20, 100), rng.randrange(100, 1000), 1000 * rng.randrange(1, 90))
    )
    unit = rng.choice(("dollars", "dollars", "euros", "pounds"))
    cents = {"dollars": "cents", "euros": "cents", "pounds": "pence"}[unit]
    kind = rng.randrange(5)
    if kind == 0:
        return f"{spell_number(rng.randrange(2, 100))} {cents}"
    if kind == 1 and whole < 100:
        return f"{spell_number(whole)} {unit} and {spell_number(rng.randrange(5, 100))} {cents}"
    if kind == 2 and whole < 100:
        return f"{spell_number(whole)} {spell_number(rng.randrange(20, 100))}"
    return f"{spell_number(whole)} {unit}"


def _draw_figure(symbol: str, rng: random.Random) -> str | None:
    """Draw a number in the symbol's form; None if the symbol is a rule of the grammar."""
    match symbol:
        case "digits":
            return " ".join(spell_number(rng.randrange(10)) for _ in range(rng.choice((5, 6, 7))))
        case "digits4":
            return " ".join(spell_number(rng.randrange(10)) for _ in range(rng.choice((3, 4))))
        case "money":
            return _money(rng)
        case "clock":
            return _clock(rng)
        case "date":
            month, day = rng.choice(SLOTS["month"]), spell_ordinal(rng.randrange(1, 32))
            return f"{month} {day}" if rng.random() < 0.5 else f"the {day} of {month}"
        case "year":
            return spell_year(rng.choice((rng.randrange(1900, 2030), rng.randrange(1500, 1900))))
        case "number":
            return spell_number(rng.choice((rng.randrange(2, 20), rng.randrange(20, 100), rng.randrange(100, 1000))))
        case "small":
            return spell_number(rng.randrange(0, 12))
        case "count":
            return rng.choice((spell_number(rng.randrange(2, 13)), "several", "many", "a few", "a dozen"))
        case "percent":
            return spell_number(rng.randrange(1, 100))
        case "bignumber":
            return spell_number(
                rng.choice((rng.randrange(100, 1000), 100 * rng.randrange(10, 1000), rng.randrange(1000, 10_000)))
            )
        case "ordinal":
            return spell_ordinal(rng.randrange(1, 32))
        case _:
            return None


def _expand(symbol: str, rng: random.Random) -> str:
    figure = _draw_figure(symbol, rng)
    if figure is not None:
        return figure
    rule = rng.choice(_ALTERNATIVES[symbol])
    return _SYMBOL.sub(lambda match: _expand(match[1], rng) if match[1] else rng.choice(SLOTS[match[2]]), rule)


_ARTICLE = re.compile(r"\ba (?=[aeiou])")
_AGREEMENT = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\b(You|you|we|We|they|They|he|she|it|everyone|someone|neighbor) am going to\b", r"\1 will"),
        (r"\b(I|you|we|they) has to\b", r"\1 have to"),
        (r"(?<!\bI) am going to\b", " will"),
        (r"\b(deer|sheep|goose|mouse|wolf|fox|calf|ox)s\b", r"\1"),
        (r"\b(butterfl|pupp|donke)ys\b", r"\1ies"),
    )
)


def _draw_grammar_line(rng: random.Random) -> str | None:
    text = _expand("line", rng)
    for pattern, replacement in _AGREEMENT:
        text = pattern.sub(replacement, text)
    return clean(" ".join(_ARTICLE.sub("an ", text).split()))


def draw_text(rng: random.Random, split: Split, folder: Path) -> str:
    """Draw one line of open text of a split.

    Args:
        folder: folder with WordNet's `data.noun`, `data.verb`, `data.adj` and `data.adv`.

    Raises:
        MissingDataError: these files are missing.
    """
    source = rng.choices(_SOURCES, _WEIGHTS)[0]
    if source != "grammar":
        lines = _wordnet(folder)[source, split]
        # Half of the examples are phrases of three to five words, shorter than ordinary speech.
        count = 3 if source == "examples" and rng.random() < 0.7 else 1
        return max((rng.choice(lines) for _ in range(count)), key=len)
    while True:
        line = _draw_grammar_line(rng)
        if line is not None and split_of(line) == split:
            return line


def iter_texts(folder: Path, *, num_generated: int = 20_000, seed: int = 0) -> Iterator[str]:
    """Yield training text for a tokenizer: each training line of WordNet once, and `num_generated` grammar lines."""
    for source in ("examples", "glosses"):
        yield from _wordnet(folder)[source, "train"]
    rng = random.Random(seed)
    count = 0
    while count < num_generated:
        line = _draw_grammar_line(rng)
        if line is not None and split_of(line) == "train":
            count += 1
            yield line


_STOP_WORDS = frozenset(
    "about above after again against almost along already also although always among another anyone anything around "
    "because become been before being below between both came cannot could does doing done down during each either else "
    "even ever every everyone everything from gave give given goes going gone have having here himself herself into itself "
    "just keep kept less like made make many might more most much must myself never next nobody none nothing often once only "
    "other others ought ourselves over perhaps quite rather really said same says seem seems several shall should since some "
    "someone something sometimes soon still such than that their them themselves then there these they thing things this "
    "those though through till together toward under until upon used very want well went were what whatever when where "
    "whether which while whom whose will with within without would your yours yourself".split()
)


def content_words(text: str) -> tuple[str, ...]:
    """List the content words of a line: four letters or more, and not in the list of function words."""
    return tuple(w for w in text.split() if len(w) >= 4 and "'" not in w and w.lower() not in _STOP_WORDS)
