//! Refcounts of 1 to 64 bits in a refcount block (section "Host cluster management").

/// The greatest refcount of `1 << order` bits.
pub fn max(order: u32) -> u64 {
    u64::MAX >> (64 - (1_u32 << order))
}

/// The refcount at `index` of a block, or of a part of it that begins at a multiple of 8 bytes.
pub fn get(block: &[u8], index: usize, order: u32) -> u64 {
    if order < 3 {
        let per_byte = 8 >> order;
        let shift = (index % per_byte) << order;
        u64::from(block[index / per_byte] >> shift) & max(order)
    } else {
        let bytes = 1 << (order - 3);
        let field = &block[index * bytes..(index + 1) * bytes];
        field.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
    }
}

/// Sets the refcount at `index`; `value` must not be above [`max`].
pub fn set(block: &mut [u8], index: usize, order: u32, value: u64) {
    debug_assert!(value <= max(order));
    if order < 3 {
        let per_byte = 8 >> order;
        let shift = (index % per_byte) << order;
        let byte = &mut block[index / per_byte];
        *byte = *byte & !((max(order) as u8) << shift) | (value as u8) << shift;
    } else {
        let bytes = 1 << (order - 3);
        let field = &mut block[index * bytes..(index + 1) * bytes];
        field.copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_its_neighbours() {
        for order in 0..=6 {
            let mut block = [0; 64];
            let count = (64 * 8) >> order;
            let value =
                |index: usize| (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & max(order);
            for index in (0..count).rev() {
                set(&mut block, index, order, value(index));
            }
            for index in 0..count {
                assert_eq!(get(&block, index, order), value(index), "order {order}, index {index}");
            }
        }
    }

    #[test]
    fn the_lowest_index_is_in_the_lowest_bits() {
        let mut block = [0; 8];
        set(&mut block, 0, 0, 1);
        set(&mut block, 3, 1, 3);
        assert_eq!(block[0], 0b1100_0001);
    }
}
