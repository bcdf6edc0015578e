//! Common English nouns of three to seven letters.

const WORDS: &str = "\
    APE ARM BAG BAR BAT BED BEE BOX BUS CAR CAT COW CUP DOG EAR EGG EYE FAN FLY FOX GEM GUN HAT HEN JAM JAR KEY LEG \
    LIP MAP MUD NET NUT OAK OIL OWL PAN PEA PEN PIE PIG POT RAT RUG SEA SKY TEA TOE TOY VAN WAX WEB \
    APPLE BAKER BEACH BREAD BRICK BRUSH CANDY CHAIR CHALK CLOCK CLOUD CORAL CREAM DAISY EAGLE EARTH FLAME FRUIT GLASS \
    GRAPE GRASS GUARD HEART HORSE HOTEL HOUSE JEWEL KNIFE LEMON LIGHT LUNCH MAPLE MEDAL METAL MOUSE MUSIC OCEAN OLIVE \
    ONION PANDA PAPER PEACH PEARL PIANO PILOT PLANT PLATE QUEEN RADIO RIVER ROBOT SALAD SHEEP SHELF SHIRT SKIRT SPOON \
    STORM SUGAR TABLE TIGER TOAST TOWEL TOWER TRAIN TRUCK VOICE WATCH WHALE WHEAT WHEEL \
    BABY BALL BANK BARN BEAR BELL BIRD BOAT BOOK BOWL CAKE CAMP CARD CAVE CITY CLAY COAT COIN CORN CRAB DEER DESK DOOR \
    DRUM DUCK FARM FERN FISH FLAG FROG GATE GIFT GOAT GOLD HAND HARP HILL JADE KING KITE LAKE LAMB LAMP LEAF LION MILK \
    MOON NEST PALM PARK PEAR PLUM POND RAIN RICE RING ROAD ROCK ROPE ROSE SALT SAND SEAL SHIP SHOE SNOW SOAP SOUP STAR \
    TENT TREE VASE WALL WAVE WOLF YARN \
    ANCHOR ARTIST BANANA BASKET BEACON BOTTLE BRIDGE BUCKET BUTTER CAMERA CANDLE CARPET CARROT CASTLE CHEESE CHERRY CIRCLE \
    COFFEE COPPER COTTON DESERT DOCTOR DRAGON ENGINE FARMER FLOWER FOREST GARDEN GUITAR HAMMER HARBOR HELMET ISLAND JACKET \
    KETTLE KITTEN LADDER LETTER LIZARD MARBLE MARKET MIRROR MONKEY NEEDLE ORANGE PARROT PENCIL PEPPER PIGEON PILLOW \
    PLANET PUZZLE RABBIT ROCKET SADDLE SCHOOL SILVER SPIDER SPRING TEMPLE TICKET TOMATO TUNNEL TURTLE VALLEY VIOLIN WINDOW \
    WINTER \
    BALLOON BLANKET CABBAGE CAPTAIN CHICKEN COMPASS CRYSTAL CURTAIN DIAMOND DOLPHIN FACTORY FEATHER GIRAFFE HOLIDAY \
    JOURNEY KITCHEN LANTERN LIBRARY LOBSTER MACHINE MORNING MUSTARD OCTOPUS ORCHARD PACKAGE PAINTER PENGUIN PICTURE PUMPKIN \
    RAILWAY SCIENCE SPARROW STATION SUNRISE TEACHER THEATER TRACTOR TRUMPET VILLAGE WEATHER";

/// The words with so many letters, both ends included, that do not read the same upside down.
pub(super) fn of_length([low, high]: [u32; 2]) -> Vec<&'static str> {
    let fits = |w: &&str| (low..=high).contains(&(w.len() as u32));
    WORDS.split_whitespace().filter(fits).filter(|w| has_an_upright(w)).collect()
}

/// Whether the text has a character that is none, or another one, when turned by half: one that tells up from down.
pub(super) fn has_an_upright(text: &str) -> bool {
    text.chars().any(|c| !"HINOSXZMW0125689-".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_distinct_capitals_of_their_length() {
        let all = of_length([3, 7]);
        let set: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(set.len(), all.len());
        assert!(all.iter().all(|w| w.chars().all(|c| c.is_ascii_uppercase())));
        for n in 3..=7 {
            let some = of_length([n, n]);
            assert!(some.len() >= 40 && some.iter().all(|w| w.len() == n as usize), "{n}: {}", some.len());
        }
        assert!(has_an_upright("CAT") && has_an_upright("374") && !has_an_upright("NOON") && !has_an_upright("6809"));
    }
}
