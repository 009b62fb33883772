//! What `qchainfs info` says of an image's encryption.

use serde_json::{Value, json};

use super::report::printable;
use crate::chain::Member;
use crate::error::{At, Result};
use crate::image::read_luks_area;
use crate::qcow2::Header;
use crate::qcow2::encryption::{CRYPT_LUKS, CRYPT_NONE, LuksDescription};

/// The object under `encrypt`, if the image is encrypted.
pub fn object(member: &Member, header: &Header) -> Result<Option<Value>> {
    if header.crypt_method == CRYPT_NONE {
        return Ok(None);
    }
    let Some(luks) = describe(member, header)? else { return Ok(Some(json!({ "format": "aes" }))) };
    let slots = luks.slots.iter().map(|slot| {
        let mut object = json!({ "active": slot.active.is_some(), "key-offset": slot.key_offset });
        if let Some((iterations, stripes)) = slot.active {
            object["iters"] = iterations.into();
            object["stripes"] = stripes.into();
        }
        object
    });
    let mut object = json!({
        "format": "luks",
        "detached-header": false,
        "cipher-alg": luks.cipher_algorithm,
        "cipher-mode": luks.cipher_mode,
        "ivgen-alg": luks.iv_generator,
        "hash-alg": luks.hash,
        "uuid": luks.uuid,
        "payload-offset": luks.payload_offset,
        "master-key-iters": luks.master_key_iterations,
        "slots": slots.collect::<Vec<_>>(),
    });
    if let Some(hash) = luks.iv_hash {
        object["ivgen-hash-alg"] = hash.into();
    }
    Ok(Some(object))
}

/// The lines under `encrypt:`; none if the image is not encrypted.
pub fn lines(member: &Member, header: &Header) -> Result<String> {
    if header.crypt_method == CRYPT_NONE {
        return Ok(String::new());
    }
    let mut text = "    encrypt:\n".to_owned();
    let mut line = |name: &str, value: &str| {
        text += &format!("        {name}: {}\n", printable(value));
    };
    let Some(luks) = describe(member, header)? else {
        line("format", "aes");
        return Ok(text);
    };
    line("ivgen alg", &luks.iv_generator);
    line("detached header", "false");
    line("hash alg", &luks.hash);
    line("cipher alg", &luks.cipher_algorithm);
    line("uuid", &luks.uuid);
    if let Some(hash) = &luks.iv_hash {
        line("ivgen hash alg", hash);
    }
    line("format", "luks");
    line("cipher mode", &luks.cipher_mode);
    text += "        slots:\n";
    for (index, slot) in luks.slots.iter().enumerate() {
        text += &format!("            [{index}]:\n");
        text += &format!("                active: {}\n", slot.active.is_some());
        if let Some((iterations, _)) = slot.active {
            text += &format!("                iters: {iterations}\n");
        }
        text += &format!("                key offset: {}\n", slot.key_offset);
        if let Some((_, stripes)) = slot.active {
            text += &format!("                stripes: {stripes}\n");
        }
    }
    text += &format!("        payload offset: {}\n", luks.payload_offset);
    text += &format!("        master key iters: {}\n", luks.master_key_iterations);
    Ok(text)
}

/// The LUKS header's description, if the image has one.
fn describe(member: &Member, header: &Header) -> Result<Option<LuksDescription>> {
    if header.crypt_method != CRYPT_LUKS {
        return Ok(None);
    }
    let area = read_luks_area(member.store(), header).at(member.path())?;
    LuksDescription::parse(&area).at(member.path()).map(Some)
}
