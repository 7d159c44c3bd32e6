/* A program over libtspi, as an application of a TPM 1.2 is written in C: keys, sealing, signing,
 * a quote, and sealing once more through an encrypted transport session.
 *
 * The TPM has an owner, and owner and storage root key have the well-known secret. Every step says
 * its name; the first that fails ends the program with status 1.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <tss/platform.h>
#include <tss/tspi.h>

#include <trousers/trousers.h>

static TSS_HCONTEXT context;
static TSS_HTPM tpm;
static TSS_HKEY srk;

static void step(const char *name, TSS_RESULT result)
{
	printf("%s: %s\n", name, result == TSS_SUCCESS ? "done" : Trspi_Error_String(result));
	if (result != TSS_SUCCESS)
		exit(1);
}

static void must(const char *name, int holds)
{
	printf("%s: %s\n", name, holds ? "done" : "does not hold");
	if (!holds)
		exit(1);
}

static void use_well_known_secret(TSS_HOBJECT object, TSS_FLAG kind)
{
	BYTE secret[] = TSS_WELL_KNOWN_SECRET;
	TSS_HPOLICY policy;

	step("policy", Tspi_Context_CreateObject(context, TSS_OBJECT_TYPE_POLICY, kind, &policy));
	step("secret", Tspi_Policy_SetSecret(policy, TSS_SECRET_MODE_SHA1, sizeof(secret), secret));
	step("assign", Tspi_Policy_AssignToObject(policy, object));
}

static TSS_HKEY new_key(TSS_FLAG kind)
{
	TSS_FLAG flags = kind | TSS_KEY_SIZE_2048 | TSS_KEY_VOLATILE | TSS_KEY_NOT_MIGRATABLE;
	TSS_HKEY key;

	step("key object", Tspi_Context_CreateObject(context, TSS_OBJECT_TYPE_RSAKEY, flags, &key));
	use_well_known_secret(key, TSS_POLICY_USAGE);
	step("TPM_CreateWrapKey", Tspi_Key_CreateKey(key, srk, 0));
	step("TPM_LoadKey2", Tspi_Key_LoadKey(key, srk));
	return key;
}

static void bind_and_unbind(void)
{
	BYTE plain[] = "a secret of the application", *out;
	TSS_HKEY key = new_key(TSS_KEY_TYPE_BIND | TSS_KEY_AUTHORIZATION);
	TSS_HENCDATA data;
	UINT32 size;

	step("bound data", Tspi_Context_CreateObject(context, TSS_OBJECT_TYPE_ENCDATA,
						     TSS_ENCDATA_BIND, &data));
	step("bind", Tspi_Data_Bind(data, key, sizeof(plain), plain));
	step("TPM_UnBind", Tspi_Data_Unbind(data, key, &size, &out));
	must("same data", size == sizeof(plain) && !memcmp(out, plain, size));
}

static void seal_and_unseal(void)
{
	BYTE plain[] = "sealed to PCR 4 and 10", *out, *value;
	TSS_HENCDATA data;
	TSS_HPCRS pcrs;
	UINT32 size, wanted[] = {4, 10}, i;

	step("sealed data", Tspi_Context_CreateObject(context, TSS_OBJECT_TYPE_ENCDATA,
						      TSS_ENCDATA_SEAL, &data));
	use_well_known_secret(data, TSS_POLICY_USAGE);
	step("PCRs", Tspi_Context_CreateObject(context, TSS_OBJECT_TYPE_PCRS, 0, &pcrs));
	for (i = 0; i < 2; i++) {
		step("TPM_PCRRead", Tspi_TPM_PcrRead(tpm, wanted[i], &size, &value));
		step("PCR value", Tspi_PcrComposite_SetPcrValue(pcrs, wanted[i], size, value));
	}
	step("TPM_Seal", Tspi_Data_Seal(data, srk, sizeof(plain), plain, pcrs));
	step("TPM_Unseal", Tspi_Data_Unseal(data, srk, &size, &out));
	must("same data", size == sizeof(plain) && !memcmp(out, plain, size));
}

static TSS_HKEY sign_and_verify(void)
{
	BYTE digest[20] = "twenty bytes of hash", *signature;
	TSS_HKEY key = new_key(TSS_KEY_TYPE_SIGNING | TSS_KEY_AUTHORIZATION);
	TSS_HHASH hash;
	UINT32 size;

	step("hash object", Tspi_Context_CreateObject(context, TSS_OBJECT_TYPE_HASH, TSS_HASH_SHA1,
						      &hash));
	step("hash value", Tspi_Hash_SetHashValue(hash, sizeof(digest), digest));
	step("TPM_Sign", Tspi_Hash_Sign(hash, key, &size, &signature));
	step("signature verifies", Tspi_Hash_VerifySignature(hash, key, size, signature));
	return key;
}

static void quote(TSS_HKEY key)
{
	TSS_VALIDATION validation = {.ulExternalDataLength = 20};
	BYTE nonce[20] = "a nonce of 20 bytes!";
	TSS_HPCRS pcrs;

	validation.rgbExternalData = nonce;
	step("PCRs", Tspi_Context_CreateObject(context, TSS_OBJECT_TYPE_PCRS, 0, &pcrs));
	step("PCR 10", Tspi_PcrComposite_SelectPcrIndex(pcrs, 10));
	/* The library checks the signature itself when it is not given a nonce; here a caller does. */
	step("TPM_Quote", Tspi_TPM_Quote(tpm, key, pcrs, &validation));
	must("what was signed and a signature",
	     validation.ulDataLength == 48 && validation.ulValidationDataLength == 256);
}

static void ticks_and_counter(TSS_HKEY key)
{
	TSS_VALIDATION validation = {.ulExternalDataLength = 20};
	BYTE nonce[20] = {1}, digest[20] = {2};
	TPM_CURRENT_TICKS ticks;
	TSS_HHASH hash;

	step("TPM_GetTicks", Tspi_TPM_ReadCurrentTicks(tpm, &ticks));
	must("ticks run", ticks.tickRate > 0);
	validation.rgbExternalData = nonce;
	step("hash object", Tspi_Context_CreateObject(context, TSS_OBJECT_TYPE_HASH, TSS_HASH_SHA1,
						      &hash));
	step("hash value", Tspi_Hash_SetHashValue(hash, sizeof(digest), digest));
	step("TPM_TickStampBlob", Tspi_Hash_TickStampBlob(hash, key, &validation));
}

static void through_a_transport_session(void)
{
	BYTE *drawn;
	TSS_HKEY storage = new_key(TSS_KEY_TYPE_STORAGE | TSS_KEY_AUTHORIZATION);

	step("transport on",
	     Tspi_SetAttribUint32(context, TSS_TSPATTRIB_CONTEXT_TRANSPORT,
				  TSS_TSPATTRIB_CONTEXTTRANS_CONTROL, TSS_TSPATTRIB_ENABLE_TRANSPORT));
	step("encrypted",
	     Tspi_SetAttribUint32(context, TSS_TSPATTRIB_CONTEXT_TRANSPORT,
				  TSS_TSPATTRIB_CONTEXTTRANS_MODE, TSS_TSPATTRIB_TRANSPORT_DEFAULT_ENCRYPTION));
	step("its key", Tspi_Context_SetTransEncryptionKey(context, storage));
	step("TPM_GetRandom inside", Tspi_TPM_GetRandom(tpm, 16, &drawn));
	seal_and_unseal();
}

int main(void)
{
	TSS_UUID srk_uuid = TSS_UUID_SRK;
	TSS_HPOLICY policy;
	BYTE secret[] = TSS_WELL_KNOWN_SECRET;
	TSS_HKEY signing;

	step("context", Tspi_Context_Create(&context));
	step("connect", Tspi_Context_Connect(context, NULL));
	step("TPM object", Tspi_Context_GetTpmObject(context, &tpm));
	use_well_known_secret(tpm, TSS_POLICY_USAGE);
	step("SRK", Tspi_Context_LoadKeyByUUID(context, TSS_PS_TYPE_SYSTEM, srk_uuid, &srk));
	step("its policy", Tspi_GetPolicyObject(srk, TSS_POLICY_USAGE, &policy));
	step("its secret", Tspi_Policy_SetSecret(policy, TSS_SECRET_MODE_SHA1, sizeof(secret), secret));

	bind_and_unbind();
	seal_and_unseal();
	signing = sign_and_verify();
	quote(signing);
	ticks_and_counter(signing);
	through_a_transport_session();
	step("free", Tspi_Context_FreeMemory(context, NULL));
	step("close", Tspi_Context_Close(context));
	puts("all done");
	return 0;
}
